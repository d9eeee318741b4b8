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


def holds_all(dtype: str | np.dtype[Any], own: str | np.dtype[Any]) -> bool:
    """Tell whether a dtype holds every value of another as it is."""
    own, target = np.dtype(own), np.dtype(dtype)
    # NumPy calls this safe, though float64 holds whole numbers only up to 2**53.
    is_rounded = own.kind in "iu" and target.kind == "f" and own.itemsize >= target.itemsize
    return np.can_cast(own, target) and not is_rounded


def cast(block: Block, dtype: str, column: str) -> Block:
    """Give an array another dtype.

    Raises
    ------
    ValueRangeError
        When that cannot hold a value: a whole number would wrap around or be rounded, a fraction be cut off, or a
        finite number become infinite. Fractions are rounded to the nearest float.
    """
    target = np.dtype(dtype)
    if block.dtype == target or not block.size:
        return block.astype(target, copy=False)
    narrowed = _narrowed(block, target)
    _require_same(block, narrowed, column)
    return narrowed


def require_fit(block: Block, dtype: str, column: str) -> None:
    """Raise :class:`ValueRangeError` where :func:`cast` would, for less than that costs."""
    target = np.dtype(dtype)
    if block.size and not holds_all(target, block.dtype) and not _is_in_range(block, target):
        _require_same(block, _narrowed(block, target), column)


def _narrowed(block: Block, target: np.dtype[Any]) -> Block:
    with np.errstate(over="ignore", invalid="ignore"):
        return block.astype(target)


def _is_in_range(block: Block, target: np.dtype[Any]) -> bool:
    """Tell whether all are whole numbers between two of which a dtype holds every one."""
    if block.dtype.kind not in "iu":
        return False
    if target.kind == "f":
        most = 2 ** (np.finfo(target).nmant + 1)
        least = -most
    elif target.kind == "b":
        least, most = 0, 1
    else:
        least, most = int(np.iinfo(target).min), int(np.iinfo(target).max)
    return bool(least <= block.min() and block.max() <= most)


def _require_same(block: Block, narrowed: Block, column: str) -> None:
    own, target = block.dtype, narrowed.dtype
    if holds_all(target, own) or _is_in_range(block, target):
        return
    if own.kind == target.kind == "f":
        changed = np.isinf(narrowed)
        if changed.any():
            changed &= np.isfinite(block)
    else:
        changed = _narrowed(narrowed, own) != block
        if own.kind in "iu" and target.kind == "f":
            # Rounded up beyond the largest there is: what that becomes on the way back, each processor knows better.
            changed |= narrowed >= float(np.iinfo(own).max)
        elif own.kind in "iu" and target.kind in "iu":
            changed |= (narrowed < 0) != (block < 0)
    if changed.any():
        raise _unfit(block[changed][0], narrowed[changed][0], column)


def _unfit(value: Any, became: Any, column: str) -> ValueRangeError:
    target = became.dtype
    if value.dtype.kind in "iu" and target.kind == "f":
        wrong = f"cannot hold exactly (the nearest is {int(became)})"
        wide = "integers" if target.itemsize == 8 else "integers or float64"
        remedy = (
            f"scale or shift the column, give the model an input of {wide}, or cast the column to double in Spark where"
            " rounding is meant"
        )
    else:
        wrong = "cannot hold"
        remedy = "scale the column, or give the model an input of a wider type"
    return ValueRangeError(
        f"column '{column}' has the value {value}, which {target.name} {wrong}, and that is what the model takes;"
        f" {remedy}",
        column=column,
        dtype=target.name,
    )
