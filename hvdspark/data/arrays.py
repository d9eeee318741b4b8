"""Arrow columns to blocks, and blocks to the model's tensors, a whole batch at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from hvdspark.data.blocks import AnyBlock, Block, LateBlock, cast, require_fit
from hvdspark.data.cells import TextBlock
from hvdspark.data.images import from_binary, from_structs
from hvdspark.data.lists import count_nulls, from_lists, has_nulls, primitive, to_lists
from hvdspark.data.sparse import SparseBlock
from hvdspark.data.vectors import from_vectors, to_vectors
from hvdspark.errors import NullValueError, RaggedArrayError
from hvdspark.plan import ColumnSpec, TensorSpec

_ONE_PER_ROW = ("scalar", "date", "timestamp", "string")


def to_block(column: pa.Array, spec: ColumnSpec) -> AnyBlock:
    """Turn an Arrow column into a block of the column's dtype.

    Parameters
    ----------
    column
        The column as Spark gives it; for vectors and images that is a struct.
    spec
        What it is; with ``size=None`` the first row decides how long the rows are.

    Raises
    ------
    NullValueError
        When there are nulls, and the spec has nothing to fill them with.
    RaggedArrayError
        When rows have different lengths, or another one than the spec says.
    ImageError
        When binaries are no images, or images differ.
    ValueRangeError
        When the spec's dtype cannot hold a value, or one that the model takes.
    """
    block = _filled(column, spec) if column.null_count else _whole(column, spec)
    require_fed(block, spec)
    return block


def require_fed(block: AnyBlock, spec: ColumnSpec) -> None:
    """Raise :class:`ValueRangeError` where the model would not get a column's values as they are."""
    if isinstance(block, np.ndarray):
        for dtype in spec.fed_as:
            require_fit(block, dtype, spec.name)


def _whole(column: pa.Array, spec: ColumnSpec) -> AnyBlock:
    """Convert a column without null rows."""
    if spec.kind == "array":
        block: AnyBlock = from_lists(column, spec)
    elif spec.kind == "vector":
        block = from_vectors(column, spec)
    elif spec.kind == "string":
        return TextBlock(column)
    elif spec.kind == "binary":
        block = from_binary(column, spec)
    elif spec.kind == "image":
        block = from_structs(column, spec)
    else:
        block = primitive(_as_numbers(column)).reshape(len(column), 1)
    if isinstance(block, LateBlock):
        return block
    return np.ascontiguousarray(cast(block, spec.dtype, spec.name))


def _as_numbers(column: pa.Array) -> pa.Array:
    """Count dates in days and timestamps in microseconds, both since 1970."""
    if pa.types.is_date32(column.type):
        return column.view(pa.int32())
    if pa.types.is_timestamp(column.type):
        return column.cast(pa.timestamp("us", column.type.tz)).view(pa.int64())
    return column


def _filled(column: pa.Array, spec: ColumnSpec) -> AnyBlock:
    """Convert a column with null rows."""
    if spec.fill is None:
        raise has_nulls(spec.name, count_nulls(column))
    if spec.kind in _ONE_PER_ROW:
        return _whole(_as_numbers(column).fill_null(spec.fill), spec)
    present = column.is_valid().to_numpy(zero_copy_only=False)
    block = _whole(column.drop_null(), spec)
    if isinstance(block, SparseBlock):
        return block.spread(present)
    assert isinstance(block, np.ndarray)
    if not present.any() and spec.size is None:
        raise NullValueError(
            f"column '{spec.name}' has {len(column)} nulls in a row, and nothing says how long they are to be; give the"
            " model an input of fixed shape, or drop them",
            column=spec.name,
            count=len(column),
        )
    whole = np.full((len(column), *block.shape[1:]), cast(np.asarray(spec.fill), spec.dtype, spec.name))
    whole[present] = block
    return whole


def fill_tensor(blocks: Mapping[str, AnyBlock], tensor: TensorSpec) -> Block:
    """Make the columns of a tensor one array of its dtype and shape, ``(rows, …)``.

    Raises
    ------
    RaggedArrayError
        When the rows do not fill the shape.
    DataError
        When values cannot be read, or the dtype cannot hold them.
    """
    parts = [_dense(blocks[name], tensor.dtype, name) for name in tensor.columns]
    joined = parts[0] if len(parts) == 1 else np.concatenate([_flat(part) for part in parts], axis=1)
    found = joined.shape[1:]
    shape = tensor.shape_for(found)
    if shape is None and (tensor.shape is not None or tensor.has_open_axis):
        raise RaggedArrayError(
            f"column '{', '.join(tensor.columns)}' holds {math.prod(found)} values per row (shape {found}), which do"
            f" not fill the model's {tensor.size or ''} (shape {tensor.shape or tensor.preferred_shape})",
            column=tensor.columns[0],
            lengths=(tensor.size or 0, math.prod(found)),
        )
    return joined.reshape(len(joined), *(found if shape is None else shape))


def _dense(block: AnyBlock, dtype: str | None, column: str) -> Block:
    if isinstance(block, LateBlock):
        return block.to_dense(dtype, column)
    return block if dtype is None else cast(block, dtype, column)


def _flat(block: Block) -> Block:
    return block.reshape(len(block), math.prod(block.shape[1:]))


def from_array(values: Block, kind: str) -> pa.Array:
    """Turn a model's output into an Arrow column.

    Parameters
    ----------
    values
        Shape ``(rows, …)``.
    kind
        ``"scalar"`` (one value per row), ``"vector"`` (Spark ML dense vectors) or ``"array"`` (lists, nested for
        more than one axis).
    """
    if kind == "scalar":
        return pa.array(values.reshape(len(values)))
    if kind == "vector":
        return to_vectors(_flat(values))
    return to_lists(values.reshape(len(values), 1) if values.ndim == 1 else values)
