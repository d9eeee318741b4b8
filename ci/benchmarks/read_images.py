"""Encoded images per second, as a rank reads and decodes them, beside pyarrow and Pillow in one thread."""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from benchmarks import dataset
from benchmarks.comparison import Comparison, interleaved, seconds
from benchmarks.dataset import KINDS, Dataset
from benchmarks.read import prepare
from hvdspark.data.arrays import fill_tensor
from hvdspark.data.source import BlockSource
from hvdspark.plan import CacheMode, TensorSpec

KIND = "encoded-images"
KEPT_TARGET = 5.0
# Rows of a chunk that a rank's batches are cut out of, and what it hands to TensorFlow.
CHUNK_ROWS = 32
IMAGES = TensorSpec(("x",), (dataset.EDGE, dataset.EDGE, 3), "uint8")


def measure(*, quick: bool) -> Iterator[Comparison]:
    """Decode the images of all files in turns, the files in the page cache."""
    title, repeats, rows = f"read, {KINDS[KIND].title}", 3 if quick else 9, 400 if quick else 2000
    with tempfile.TemporaryDirectory() as folder:
        # A JVM in this process would disturb.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as writer:
            written = writer.submit(prepare, Path(folder), KIND, rows).result()
        kept = source(written, "memory")
        read_pass(kept, 0, rows)
        contestants: list[Callable[[], object]] = [
            lambda: read_pass(source(written, "none"), 0, rows),
            lambda: read_pass(kept, 1, rows),
            partial(read_bare, written.files, rows),
        ]
        first, later, bare = interleaved(repeats, *(partial(_rate, rows, contestant) for contestant in contestants))
    yield Comparison(f"{title} vs pyarrow and Pillow in one thread", "rows/s", first, bare)
    yield Comparison(f"{title}, later epochs vs the same", "rows/s", later, bare, KEPT_TARGET)


def source(written: Dataset, cache: CacheMode) -> BlockSource:
    """Open a dataset as a rank does."""
    return BlockSource(written.store, written.folder, written.columns, written.reads, shuffle=True, cache=cache)


def read_pass(opened: BlockSource, number: int, rows: int) -> None:
    """Read all images as a rank does, in one pass."""
    found = sum(len(fill_tensor(blocks, IMAGES)) for item in opened.passes([number], CHUNK_ROWS) for blocks in item)
    if found != rows:
        raise ValueError(f"{found} of {rows} images came")


def read_bare(files: Sequence[str], rows: int) -> None:
    """Read all images with pyarrow and Pillow alone."""
    found = 0
    for path in files:
        with pq.ParquetFile(path, memory_map=True) as parquet:
            for group in range(parquet.num_row_groups):
                for cell in parquet.read_row_group(group).column("x"):
                    with Image.open(io.BytesIO(cell.as_buffer())) as image:
                        found += len(np.asarray(image)) > 0
    if found != rows:
        raise ValueError(f"{found} of {rows} images came")


def _rate(rows: int, contestant: Callable[[], object]) -> float:
    return rows / seconds(contestant)
