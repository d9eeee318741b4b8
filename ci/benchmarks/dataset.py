"""Datasets as an estimator writes them; what the cases know of the engine's inside is here."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from PIL import Image

from benchmarks import data
from hvdspark import Store
from hvdspark.data.materialize import materialize
from hvdspark.data.partitions import TRAIN, Split
from hvdspark.data.schema import check_columns
from hvdspark.data.shards import plan_shards, reads_of
from hvdspark.plan import ColumnSpec, GroupRead

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

WIDTH = 40
IMAGE_BYTES = 3072
EDGE = 224
DIFFERENT_IMAGES = 64
LABEL = "label"


@dataclass(frozen=True)
class Kind:
    """A kind of rows: what its table is called, how its columns are made, and the columns of features."""

    title: str
    make: Callable[[int], dict[str, Any]]
    features: Sequence[str]


def _floats(rows: int) -> Any:
    return np.random.default_rng(0).standard_normal((rows, WIDTH), dtype=np.float32)


def _array(rows: int) -> dict[str, Any]:
    return {"x": data.list_column(_floats(rows)), LABEL: np.zeros(rows, dtype=np.float32)}


def _scalars(rows: int) -> dict[str, Any]:
    floats = _floats(rows)
    return {**{f"x{i}": np.ascontiguousarray(floats[:, i]) for i in range(WIDTH)}, LABEL: floats[:, 0].copy()}


def _images(rows: int) -> dict[str, Any]:
    pixels = np.random.default_rng(0).integers(0, 256, (rows, IMAGE_BYTES), dtype=np.uint8)
    return {"x": data.binary_column(pixels), LABEL: np.zeros(rows, dtype=np.float32)}


def _encoded_images(rows: int) -> dict[str, Any]:
    random = np.random.default_rng(0)
    # Blurred noise is about as hard to decode as a photograph, and few pictures are as good as many.
    files = []
    for _ in range(min(rows, DIFFERENT_IMAGES)):
        coarse = random.integers(0, 256, (EDGE // 8, EDGE // 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((EDGE, EDGE), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    cells = [files[row % len(files)] for row in range(rows)]
    return {"x": pa.array(cells, pa.binary()), LABEL: np.zeros(rows, dtype=np.float32)}


KINDS = {
    "array": Kind("40 floats in an array column", _array, ["x"]),
    "scalars": Kind("40 columns of a float", _scalars, [f"x{i}" for i in range(WIDTH)]),
    "images": Kind("images of 3,072 bytes", _images, ["x"]),
    "encoded-images": Kind("JPEG images of 224 x 224", _encoded_images, ["x"]),
}


@dataclass(frozen=True)
class Dataset:
    """A dataset in a Store: its columns, and what a single rank reads of it."""

    store: Store
    folder: str
    columns: tuple[ColumnSpec, ...]
    reads: list[GroupRead]

    @property
    def rows(self) -> int:
        """Rows in it."""
        return sum(read.rows for read in self.reads)

    @property
    def files(self) -> list[str]:
        """Paths of its files."""
        return sorted({self.store.path(self.folder, read.group.path) for read in self.reads})

    @property
    def url(self) -> str:
        """The address that Petastorm opens it by."""
        return Path(self.store.path(self.folder, TRAIN)).as_uri()


def write(df: DataFrame, kind: Kind, store: Store) -> Dataset:
    """Write a DataFrame as an estimator does."""
    features: list[Any] = [list(kind.features)]
    columns, _ = check_columns(df.schema, feature_cols=features, label_cols=[LABEL])
    folder, manifest = materialize(df, columns, Split(), store)
    plan = plan_shards(manifest.splits[TRAIN], 1, 1024, keep_order=True)
    return Dataset(store, folder, manifest.columns, reads_of(plan, 0))


def to_numpy(column: pa.ChunkedArray) -> Any:
    """Turn a column of a row group into numbers, with pyarrow and NumPy alone.

    Packed rows become what the shard reader makes of them, a contiguous block of numbers without the header of every
    row: a view that leaves that to a later step would be no result to compare with.
    """
    chunk = column.chunk(0)
    if pa.types.is_list(chunk.type):
        return chunk.values.to_numpy().reshape(len(chunk), -1)
    if not pa.types.is_fixed_size_binary(chunk.type):
        return chunk.to_numpy()
    cells = np.frombuffer(chunk.buffers()[1], dtype=np.uint8).reshape(len(chunk), -1)
    dtype, size = (np.uint8, IMAGE_BYTES) if cells.shape[1] > IMAGE_BYTES else (np.float32, WIDTH)
    return np.ascontiguousarray(cells[:, -size * np.dtype(dtype).itemsize :]).view(dtype)
