"""Arrow columns to NumPy blocks and back, a whole batch at a time.

A *block* is a C-contiguous array of shape ``(rows, size)``: the values of one column for some rows.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hvdspark.errors import NullValueError, RaggedArrayError, ValueRangeError
from hvdspark.plan import ColumnSpec, TensorSpec

# How Spark stores its ML vectors: VectorUDT.sqlType() in pyspark.ml.linalg. type 0 is sparse, 1 is dense.
VECTOR_TYPE = pa.struct(
    [
        pa.field("type", pa.int8(), nullable=False),
        pa.field("size", pa.int32()),
        pa.field("indices", pa.list_(pa.field("element", pa.int32(), nullable=False))),
        pa.field("values", pa.list_(pa.field("element", pa.float64(), nullable=False))),
    ]
)

Block = npt.NDArray[Any]


def count_nulls(column: pa.Array, spec: ColumnSpec) -> int:
    """Count the rows that are null and the null elements inside arrays."""
    nulls = int(column.null_count)
    if spec.kind == "array":
        nulls += int(column.flatten().null_count)
    return nulls


def to_block(column: pa.Array, spec: ColumnSpec) -> Block:
    """Turn an Arrow column into a block of the column's dtype.

    Parameters
    ----------
    column
        The column; for vectors Spark's struct of type, size, indices and values.
    spec
        What it is; with ``size=None`` the first row decides how long the rows are.

    Raises
    ------
    NullValueError
        When there are nulls.
    RaggedArrayError
        When rows have different lengths, or another one than the spec says.
    """
    nulls = count_nulls(column, spec)
    if nulls:
        raise NullValueError(f"column '{spec.name}' has {nulls} nulls", column=spec.name, count=nulls)
    if spec.kind == "vector":
        block = _from_vectors(column, spec)
    elif spec.kind == "array":
        values = column.flatten()
        size = _common_length(np.diff(_offsets(column)), spec)
        block = _primitive(values).reshape(len(column), size)
    else:
        block = _primitive(column).reshape(len(column), 1)
    return np.ascontiguousarray(cast(block, spec.dtype, spec.name))


def cast(block: Block, dtype: str, column: str) -> Block:
    """Give a block another dtype.

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
        raise out_of_range(column, dtype)
    return narrowed


def out_of_range(column: str, dtype: str) -> ValueRangeError:
    """Make the error for a column whose values a type cannot hold."""
    return ValueRangeError(
        f"column '{column}' has values that {dtype} cannot hold, which is what the model takes; scale the column, or"
        " give the model an input of a wider type",
        column=column,
        dtype=dtype,
    )


def _primitive(column: pa.Array) -> Block:
    """View an Arrow array of numbers as NumPy (booleans are bits in Arrow, so those are copied)."""
    return np.asarray(column.to_numpy(zero_copy_only=not pa.types.is_boolean(column.type)))


def _offsets(column: pa.ListArray) -> Block:
    return np.asarray(column.offsets.to_numpy())


def _common_length(lengths: Block, spec: ColumnSpec) -> int:
    """Return the one length that all rows have."""
    if len(lengths) == 0:
        return spec.size or 0
    expected = int(lengths[0]) if spec.size is None else spec.size
    wrong = lengths[lengths != expected]
    if len(wrong):
        found = int(wrong[0])
        raise RaggedArrayError(
            f"column '{spec.name}' has rows of different lengths: expected {expected} values, found {found}. Pad"
            " or cut the arrays to one length before fit().",
            column=spec.name,
            lengths=(expected, found),
        )
    return expected


def _from_vectors(column: pa.StructArray, spec: ColumnSpec) -> Block:
    """Densify Spark ML vectors; a batch of dense ones costs no more than its values."""
    dense = _primitive(column.field("type")) == 1
    values = column.field("values")
    starts = _offsets(values)
    counts = np.diff(starts)
    numbers = _primitive(values.values)
    if dense.all():
        size = _common_length(counts, spec)
        return numbers[starts[0] : starts[-1]].reshape(len(column), size)
    sizes = np.where(dense, counts, column.field("size").fill_null(0).to_numpy(zero_copy_only=False))
    size = _common_length(sizes, spec)
    block = np.zeros((len(column), size), dtype=spec.dtype)
    row_of = np.repeat(np.arange(len(column)), counts)
    position = np.arange(starts[0], starts[-1])
    # A dense row has no indices: there a value's place is its distance from the row's first value.
    place = position - np.repeat(starts[:-1], counts)
    is_sparse = ~dense[row_of]
    indices = column.field("indices")
    flat = indices.values.to_numpy()
    first = _offsets(indices)[:-1]
    place[is_sparse] = flat[(np.repeat(first, counts) + place)[is_sparse]]
    block[row_of, place] = numbers[position]
    return block


def pack(block: Block) -> pa.Array:
    """Store each row of a block as one fixed-width binary cell in NumPy's ``.npy`` format.

    That is what Petastorm's ``NdarrayCodec`` writes and reads; with the same header in every cell a whole
    column is one buffer, which reads several times faster than Parquet lists.
    """
    header = npy_header(block.shape[1], block.dtype.name)
    cells = np.empty((len(block), len(header) + block.shape[1] * block.itemsize), dtype=np.uint8)
    cells[:, : len(header)] = np.frombuffer(header, dtype=np.uint8)
    cells[:, len(header) :] = (
        np.ascontiguousarray(block).view(np.uint8).reshape(len(block), cells.shape[1] - len(header))
    )
    buffer = pa.py_buffer(cells)
    return pa.Array.from_buffers(pa.binary(cells.shape[1]), len(block), [None, buffer])


def unpack(column: pa.Array, spec: ColumnSpec) -> Block:
    """Turn what :func:`pack` made back into a block; raises ``ValueError`` when it is anything else."""
    assert spec.size is not None
    header = npy_header(spec.size, spec.dtype)
    width = len(header) + spec.size * np.dtype(spec.dtype).itemsize
    if column.type != pa.binary(width):
        raise ValueError(f"column '{spec.name}' is stored as {column.type}, not as {spec.size} {spec.dtype} values")
    start = column.offset * width
    flat = np.frombuffer(column.buffers()[1], dtype=np.uint8, count=len(column) * width, offset=start)
    cells = flat.reshape(len(column), width)
    if not (cells[:, : len(header)] == np.frombuffer(header, dtype=np.uint8)).all():
        raise ValueError(f"column '{spec.name}' has cells that are not {spec.size} {spec.dtype} values")
    values = np.ascontiguousarray(cells[:, len(header) :])
    return values.view(spec.dtype).reshape(len(column), spec.size)


@functools.lru_cache(maxsize=256)
def npy_header(size: int, dtype: str) -> bytes:
    """Return the ``.npy`` header of a flat array.

    Source: numpy.lib.format, version 1.0 of the format. It is padded to 16 bytes instead of NumPy's 64: readers
    go by the length it states.
    """
    descr = np.lib.format.dtype_to_descr(np.dtype(dtype))
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': ({size},)}}".encode()
    text += b" " * (-(len(text) + 11) % 16) + b"\n"
    out = io.BytesIO()
    out.write(np.lib.format.magic(1, 0) + len(text).to_bytes(2, "little") + text)
    return out.getvalue()


def fill_tensor(blocks: Mapping[str, Block], tensor: TensorSpec) -> Block:
    """Concatenate a tensor's columns and give them its dtype and shape, ``(rows, …)``."""
    parts = [blocks[name] for name in tensor.columns]
    if tensor.dtype is not None:
        parts = [cast(part, tensor.dtype, name) for part, name in zip(parts, tensor.columns, strict=True)]
    joined = parts[0] if len(parts) == 1 else np.concatenate(parts, axis=1)
    if tensor.shape is None:
        return joined.reshape(len(joined), *(tensor.shape_for(joined.shape[1]) or (joined.shape[1],)))
    if joined.shape[1] != tensor.size:
        raise RaggedArrayError(
            f"column '{', '.join(tensor.columns)}' holds {joined.shape[1]} values per row, but the model takes"
            f" {tensor.size} (shape {tensor.shape})",
            column=tensor.columns[0],
            lengths=(tensor.size or 0, joined.shape[1]),
        )
    return joined.reshape(len(joined), *tensor.shape)


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
    rows = len(values)
    if kind == "scalar":
        return pa.array(values.reshape(rows))
    if kind == "vector":
        return _to_vectors(values.reshape(rows, math.prod(values.shape[1:])).astype(np.float64))
    if values.ndim == 1:
        values = values.reshape(rows, 1)
    column = pa.array(values.reshape(-1))
    for axis in range(values.ndim - 1, 0, -1):
        length = values.shape[axis]
        lists = int(np.prod(values.shape[:axis], dtype=np.int64))
        column = pa.ListArray.from_arrays(np.arange(lists + 1, dtype=np.int32) * length, column)
    return column


def _to_vectors(values: Block) -> pa.StructArray:
    rows, size = values.shape
    offsets = np.arange(rows + 1, dtype=np.int32) * size
    lists = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.reshape(-1)), type=VECTOR_TYPE[3].type)
    return pa.StructArray.from_arrays(
        [
            pa.array(np.ones(rows, dtype=np.int8)),
            pa.nulls(rows, pa.int32()),
            pa.nulls(rows, VECTOR_TYPE[2].type),
            lists,
        ],
        fields=list(VECTOR_TYPE),
    )
