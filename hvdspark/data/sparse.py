"""Blocks of sparse vectors, and how they are stored."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hvdspark.data.blocks import Block, LateBlock, Rows, cast
from hvdspark.data.npy import npy_header
from hvdspark.plan import Storage

Integers = npt.NDArray[np.integer[Any]]

# Every cell begins with a header of this length, a multiple of an entry's 8 or 12 bytes, so that a whole column can be
# looked at as entries.
_HEADER_BYTES = 120


class SparseBlock(LateBlock):
    """Vectors of which only some values are kept; all others are zero (compressed sparse rows).

    Parameters
    ----------
    starts
        Shape ``(rows + 1,)``, from zero: the entries of row ``i`` are those from ``starts[i]`` to ``starts[i + 1]``.
    indices, values
        Place and value of each entry.
    size
        Values per row.
    """

    def __init__(self, starts: Integers, indices: Integers, values: Block, size: int) -> None:
        self.starts = starts
        self.indices = indices
        self.values = values
        self.size = size

    @property
    def storage(self) -> Storage:
        """Sparse."""
        return "sparse"

    @property
    def nbytes(self) -> int:
        """Bytes of the entries and of the rows' starts."""
        return self.starts.nbytes + self.indices.nbytes + self.values.nbytes

    @property
    def dense_row_bytes(self) -> int:
        """Bytes of all values of a row."""
        return self.size * self.values.itemsize

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, rows: Rows) -> Self:
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step == 1:
                starts = self.starts[start : max(stop, start) + 1]
                first, last = starts[0], starts[-1]
                return type(self)(starts - first, self.indices[first:last], self.values[first:last], self.size)
            rows = np.arange(start, stop, step)
        elif rows.dtype == bool:
            rows = np.flatnonzero(rows)
        counts = np.diff(self.starts)[rows]
        starts = starts_of(counts)
        entries = np.arange(starts[-1]) + np.repeat(self.starts[:-1][rows] - starts[:-1], counts)
        return type(self)(starts, self.indices[entries], self.values[entries], self.size)

    def joined_to(self, others: Sequence[Self]) -> Self:
        """Return the vectors of this block and of others."""
        blocks = [self, *others]
        counts = np.concatenate([np.diff(block.starts) for block in blocks])
        indices = np.concatenate([block.indices for block in blocks])
        values = np.concatenate([block.values for block in blocks])
        return type(self)(starts_of(counts), indices, values, self.size)

    def spread(self, present: npt.NDArray[np.bool_]) -> Self:
        """Return as many rows as the mask has, of which those that it leaves out hold zeros."""
        counts = np.zeros(len(present), dtype=np.int64)
        counts[present] = np.diff(self.starts)
        return type(self)(starts_of(counts), self.indices, self.values, self.size)

    def to_dense(self, dtype: str | None, column: str) -> Block:
        """Make the vectors an array of shape ``(rows, size)``."""
        values = self.values if dtype is None else cast(self.values, dtype, column)
        block = np.zeros((len(self), self.size), dtype=values.dtype)
        block[np.repeat(np.arange(len(self)), np.diff(self.starts)), self.indices] = values
        return block

    def to_parquet(self) -> pa.Array:
        """Store each vector as one cell: an array of ``(index, value)`` entries in NumPy's ``.npy`` format."""
        entry = _entry(self.values.dtype)
        counts = np.diff(self.starts)
        lead = _HEADER_BYTES // entry.itemsize
        begins = self.starts[:-1] + lead * np.arange(len(self))
        flat = np.empty(int(self.starts[-1]) + lead * len(self), dtype=entry)
        is_entry = np.ones(len(flat), dtype=bool)
        is_entry[(begins[:, None] + np.arange(lead)).ravel()] = False
        flat["index"][is_entry] = self.indices
        flat["value"][is_entry] = self.values
        # Not by a field: headers are bytes, not entries.
        flat.view(f"V{entry.itemsize}")[~is_entry] = _headers(counts, entry)
        offsets = np.append(begins, len(flat)).astype(np.int64) * entry.itemsize
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(flat)]
        return pa.Array.from_buffers(pa.large_binary(), len(self), buffers).cast(pa.binary())

    @classmethod
    def from_parquet(cls, column: pa.Array, size: int, dtype: str) -> Self:
        """Read what :meth:`to_parquet` made; raises ``ValueError`` when it is anything else."""
        entry = _entry(np.dtype(dtype))
        cells = column.cast(pa.large_binary())
        lengths = cells.offset + np.arange(len(cells) + 1)
        offsets = np.frombuffer(cells.buffers()[1], dtype=np.int64)[lengths]
        counts, rest = np.divmod(np.diff(offsets) - _HEADER_BYTES, entry.itemsize)
        if rest.any() or (counts < 0).any():
            raise ValueError(f"cells that are not {dtype} entries of a sparse vector")
        data = np.frombuffer(cells.buffers()[2] or b"", dtype=np.uint8)[offsets[0] : offsets[-1]]
        flat = data.view(entry)
        lead = _HEADER_BYTES // entry.itemsize
        begins = (offsets[:-1] - offsets[0]) // entry.itemsize
        is_entry = np.ones(len(flat), dtype=bool)
        is_entry[(begins[:, None] + np.arange(lead)).ravel()] = False
        if flat[~is_entry].tobytes() != _headers(counts, entry).tobytes():
            raise ValueError(f"cells that are not {dtype} entries of a sparse vector")
        indices = flat["index"][is_entry]
        if len(indices) and not (indices.min() >= 0 and indices.max() < size):
            raise ValueError(f"indices outside of a vector of {size} values")
        return cls(starts_of(counts), indices, flat["value"][is_entry], size)


def starts_of(counts: Integers) -> Integers:
    """Return where the entries of each row start, and where the last one's end."""
    starts = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=starts[1:])
    return starts


def _entry(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype([("index", np.int32), ("value", dtype)])


def _headers(counts: Integers, entry: np.dtype[Any]) -> Block:
    """Return the headers of cells with so many entries each, cut into pieces as long as an entry."""
    different, which = np.unique(counts, return_inverse=True)
    headers = b"".join(_header(int(count), entry) for count in different)
    table = np.frombuffer(headers, dtype=f"V{entry.itemsize}").reshape(len(different), _HEADER_BYTES // entry.itemsize)
    return np.asarray(table[which].ravel())


@functools.lru_cache(maxsize=4096)
def _header(count: int, entry: np.dtype[Any]) -> bytes:
    return npy_header((count,), entry, length=_HEADER_BYTES)
