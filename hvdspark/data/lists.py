"""Arrow lists, nested or not, to arrays and back."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from hvdspark.data.blocks import Block, cast
from hvdspark.errors import NullValueError, RaggedArrayError
from hvdspark.plan import ColumnSpec


def count_nulls(column: pa.Array) -> int:
    """Count the rows that are null and the null elements inside lists."""
    nulls = int(column.null_count)
    while _is_list(column.type):
        column = column.flatten()
        nulls += int(column.null_count)
    return nulls


def _is_list(found: pa.DataType) -> bool:
    return bool(pa.types.is_list(found) or pa.types.is_large_list(found))


def has_nulls(name: str, count: int) -> NullValueError:
    """Make the error for a column with nulls."""
    return NullValueError(f"column '{name}' has {count} nulls", column=name, count=count)


def from_lists(column: pa.ListArray | pa.LargeListArray, spec: ColumnSpec) -> Block:
    """Turn lists into an array with an axis per level; no row may be null.

    Raises
    ------
    NullValueError
        When a list within is null, or an element and the spec has no fill.
    RaggedArrayError
        When lists of one level have different lengths, or another one than the spec's.
    """
    if spec.padding is not None:
        return _padded(column, spec)
    rows = len(column)
    shape: list[int] = []
    stated = spec.row_shape or ()
    while _is_list(column.type):
        if column.null_count:
            raise has_nulls(spec.name, column.null_count)
        expected = stated[len(shape)] if len(shape) < len(stated) else None
        shape.append(common_length(np.diff(offsets_of(column)), spec, expected))
        column = column.flatten()
    return primitive(_without_nulls(column, spec)).reshape(rows, *shape)


def _padded(column: pa.ListArray | pa.LargeListArray, spec: ColumnSpec) -> Block:
    """Fill rows up at their ends."""
    assert spec.size is not None, "the length of padded rows is known before they are read"
    lengths = np.diff(offsets_of(column))
    if len(lengths) and lengths.max() > spec.size:
        longest = int(lengths.max())
        raise RaggedArrayError(
            f"column '{spec.name}' has a row of {longest} values, but rows are padded to {spec.size}; nothing is cut"
            f" off unasked: give padding={{'{spec.name}': {{'value': {spec.padding!r}, 'length': {longest}}}}} and a"
            f" model that takes as many, or cut the arrays with slice() first",
            column=spec.name,
            lengths=(spec.size, longest),
        )
    block = np.full((len(column), spec.size), cast(np.asarray(spec.padding), spec.dtype, spec.name))
    values = primitive(_without_nulls(column.flatten(), spec))
    block[np.arange(spec.size) < lengths[:, None]] = cast(values, spec.dtype, spec.name)
    return block


def _without_nulls(values: pa.Array, spec: ColumnSpec) -> pa.Array:
    if not values.null_count:
        return values
    if spec.fill is None:
        raise has_nulls(spec.name, values.null_count)
    return values.fill_null(spec.fill)


def primitive(column: pa.Array) -> Block:
    """View an Arrow array of numbers as NumPy (booleans are bits in Arrow, so those are copied)."""
    return np.asarray(column.to_numpy(zero_copy_only=not pa.types.is_boolean(column.type)))


def offsets_of(column: pa.ListArray | pa.LargeListArray) -> Block:
    """Return where the elements of each list begin, and where the last one's end."""
    return np.asarray(column.offsets.to_numpy())


def common_length(lengths: Block, spec: ColumnSpec, expected: int | None) -> int:
    """Return the one length that all rows have.

    Raises
    ------
    RaggedArrayError
        When they have different ones, or another one than is expected.
    """
    if len(lengths) == 0:
        return expected or 0
    length = int(lengths[0]) if expected is None else expected
    wrong = lengths[lengths != length]
    if len(wrong):
        raise ragged(spec.name, (length, int(wrong[0])))
    return length


def ragged(name: str, lengths: tuple[int, int]) -> RaggedArrayError:
    """Make the error for a column whose rows have different lengths."""
    return RaggedArrayError(
        f"column '{name}' has rows of different lengths: expected {lengths[0]} values, found {lengths[1]}. All rows of"
        f" a column need the same length. Pad short rows with padding={{'{name}': 0}}, or pad or cut the arrays before"
        " fit().",
        column=name,
        lengths=lengths,
    )


def to_lists(values: Block) -> pa.Array:
    """Turn an array into lists, nested for more than one axis besides the rows'."""
    column = pa.array(values.reshape(-1))
    for axis in range(values.ndim - 1, 0, -1):
        length = values.shape[axis]
        lists = int(np.prod(values.shape[:axis], dtype=np.int64))
        column = pa.ListArray.from_arrays(np.arange(lists + 1, dtype=np.int32) * length, column)
    return column
