"""The rows that are measured with: random, the same on every run, written by pyarrow as plain Parquet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

FILES = 4
FEATURES = 28
Floats = npt.NDArray[np.float32]


def labelled(rows: int, seed: int = 0) -> tuple[Floats, Floats]:
    """Make rows of two classes that a small network learns to tell apart.

    Returns
    -------
    features : ndarray
        Shape ``(rows, 28)``.
    labels : ndarray
        Shape ``(rows,)``, 0 or 1.
    """
    random = np.random.default_rng(seed)
    features = random.standard_normal((rows, FEATURES), dtype=np.float32)
    direction = np.random.default_rng(1).standard_normal(FEATURES, dtype=np.float32)
    noise = random.standard_normal(rows, dtype=np.float32)
    return features, (features @ direction + noise > 0).astype(np.float32)


def list_column(values: npt.NDArray[Any]) -> pa.ListArray:
    """Make a column of lists, as Spark writes ``array<…>``, of a block of shape ``(rows, size)``."""
    offsets = np.arange(0, values.size + 1, values.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, values.reshape(-1))


def binary_column(values: npt.NDArray[Any]) -> pa.BinaryArray:
    """Make a column of binaries, each the bytes of a row of a block of shape ``(rows, size)``."""
    size = values.shape[1] * values.itemsize
    offsets = np.arange(0, values.nbytes + 1, size, dtype=np.int32)
    return pa.BinaryArray.from_buffers(pa.binary(), len(values), [None, pa.py_buffer(offsets), pa.py_buffer(values)])


def write_parquet(folder: Path, columns: dict[str, Any]) -> Path:
    """Write columns as some Parquet files, the way Spark does by default: Snappy, with dictionaries."""
    table = pa.table(columns)
    folder.mkdir(parents=True)
    per_file = -(-table.num_rows // FILES)
    for number in range(FILES):
        part = table.slice(number * per_file, per_file)
        pq.write_table(part, folder / f"part-{number}.parquet", compression="snappy", row_group_size=1 << 17)
    return folder


def write_labelled(folder: Path, rows: int, seed: int = 0) -> Path:
    """Write :func:`labelled` rows with the columns ``features`` and ``label``."""
    features, labels = labelled(rows, seed)
    return write_parquet(folder, {"features": list_column(features), "label": labels})
