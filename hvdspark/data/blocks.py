"""Blocks: the values of one column for some rows, as they move from the files to the batches.

Most blocks are NumPy arrays. What takes far less room as it was stored (sparse vectors, encoded images, text) stays so
in a :class:`LateBlock`, and becomes an array only a few rows at a time.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from hvdspark.errors import ValueRangeError
from hvdspark.plan import Storage

# Of shape ``(rows, …)``. The values of a row are next to each other; between rows there may be gaps, where a block is a
# view into what was read.
Block = npt.NDArray[Any]
Rows = slice | npt.NDArray[np.integer[Any]] | npt.NDArray[np.bool_]

# Columns are put side by side this many bytes at a time, so that what is written stays in the processor's cache until
# all columns are through.
STACK_BYTES = 256 << 10

# Late blocks are made dense this many bytes at a time: more than a usual batch, little beside a rank's memory.
DENSE_BYTES = 16 << 20


class LateBlock(abc.ABC):
    """Rows that are not an array yet. Cut and joined like one, by slices, index arrays and masks of rows."""

    @property
    @abc.abstractmethod
    def storage(self) -> Storage:
        """How the rows are stored."""

    @property
    @abc.abstractmethod
    def nbytes(self) -> int:
        """Bytes that the rows take as they are."""

    @property
    @abc.abstractmethod
    def dense_row_bytes(self) -> int:
        """Bytes that a row takes once it is dense, to plan with."""

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, rows: Rows) -> Self: ...

    @abc.abstractmethod
    def joined_to(self, others: Sequence[Self]) -> Self:
        """Return the rows of this block and of others of its kind, in order."""

    @abc.abstractmethod
    def to_dense(self, dtype: str | None, column: str) -> Block:
        """Make the rows an array.

        Parameters
        ----------
        dtype
            The values' dtype; ``None`` for their own.
        column
            Name of the column, for errors.

        Raises
        ------
        DataError
            When the values cannot be read, or do not fit the dtype.
        """


AnyBlock = Block | LateBlock
Blocks = dict[str, AnyBlock]


def concatenate(blocks: Sequence[AnyBlock]) -> AnyBlock:
    """Join blocks of one column."""
    first = blocks[0]
    if len(blocks) == 1:
        return first
    if isinstance(first, LateBlock):
        return first.joined_to([block for block in blocks[1:] if isinstance(block, LateBlock)])
    return np.concatenate([block for block in blocks if isinstance(block, np.ndarray)])


def row_count(blocks: Mapping[str, AnyBlock]) -> int:
    """Count the rows that columns have."""
    return len(next(iter(blocks.values())))


def size_bytes(blocks: Mapping[str, AnyBlock]) -> int:
    """Count the bytes that columns take as they are."""
    return sum(block.nbytes for block in blocks.values())


def join(items: Sequence[Blocks]) -> Blocks:
    """Put the rows of several blocks of the same columns one after the other."""
    return {name: concatenate([item[name] for item in items]) for name in items[0]}


def take(block: AnyBlock, rows: slice | npt.NDArray[np.int64]) -> AnyBlock:
    """Return some rows of a block, in the order given."""
    # np.take is several times faster than block[rows]; but of an array with gaps it would first copy the whole.
    if isinstance(rows, np.ndarray) and isinstance(block, np.ndarray) and block.flags.c_contiguous:
        return np.take(block, rows, axis=0)
    return block[rows]


def stack(blocks: Blocks, stacks: Mapping[str, Sequence[str]]) -> Blocks:
    """Put columns side by side into one block, which takes their place.

    Parameters
    ----------
    blocks
        Columns of the same rows.
    stacks
        Names of the new blocks, and the columns of each; those are flat arrays of one dtype, and no column is in two.
    """
    gone = {column for columns in stacks.values() for column in columns}
    found = {name: block for name, block in blocks.items() if name not in gone}
    for name, columns in stacks.items():
        found[name] = _side_by_side([np.asarray(blocks[column]) for column in columns])
    return found


def _side_by_side(parts: Sequence[Block]) -> Block:
    out = np.empty((len(parts[0]), sum(part.shape[1] for part in parts)), parts[0].dtype)
    step = max(1, STACK_BYTES // (out.shape[1] * out.itemsize))
    for start in range(0, len(out), step):
        rows = slice(start, start + step)
        np.concatenate([part[rows] for part in parts], axis=1, out=out[rows])
    return out


def storage_of(block: AnyBlock) -> Storage:
    """Tell how a block is stored."""
    return block.storage if isinstance(block, LateBlock) else "dense"


def late_slices(blocks: Mapping[str, AnyBlock], max_rows: int | None = None) -> Iterator[slice]:
    """Cut rows into slices whose late blocks stay small once they are dense.

    Parameters
    ----------
    blocks
        Blocks of the same rows.
    max_rows
        Rows of a slice at most; by default arrays are not cut at all.
    """
    rows = row_count(blocks)
    row_bytes = sum(block.dense_row_bytes for block in blocks.values() if isinstance(block, LateBlock))
    limit = rows if max_rows is None else max_rows
    if row_bytes:
        limit = min(limit, DENSE_BYTES // row_bytes)
    step = max(limit, 1)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def cast(block: Block, dtype: str, column: str) -> Block:
    """Give an array another dtype.

    Raises
    ------
    ValueRangeError
        When that cannot hold a value: an integer would wrap around, or a finite number become infinite.
    """
    target = np.dtype(dtype)
    if block.dtype == target or not block.size:
        return block.astype(target, copy=False)
    fits = True
    if target.kind in "iu" and block.dtype.kind in "iu" and not np.can_cast(block.dtype, target):
        limits = np.iinfo(target)
        fits = bool(block.min() >= limits.min and block.max() <= limits.max)
    with np.errstate(over="ignore"):
        narrowed = block.astype(target)
    if target.kind == "f" and block.dtype.kind == "f" and target.itemsize < block.itemsize:
        fits = bool(np.isfinite(narrowed).all()) or bool((np.isfinite(narrowed) == np.isfinite(block)).all())
    if not fits:
        raise ValueRangeError(
            f"column '{column}' has values that {dtype} cannot hold, which is what the model takes; scale the column,"
            " or give the model an input of a wider type",
            column=column,
            dtype=dtype,
        )
    return narrowed
