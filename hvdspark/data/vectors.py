"""Spark ML vectors in Arrow to blocks and back."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from hvdspark.data.blocks import AnyBlock, Block, cast
from hvdspark.data.lists import common_length, offsets_of
from hvdspark.data.sparse import SparseBlock, starts_of
from hvdspark.plan import ColumnSpec

# How Spark stores its ML vectors: VectorUDT.sqlType() in pyspark.ml.linalg. type 0 is sparse, 1 is dense.
VECTOR_TYPE = pa.struct(
    [
        pa.field("type", pa.int8(), nullable=False),
        pa.field("size", pa.int32()),
        pa.field("indices", pa.list_(pa.field("element", pa.int32(), nullable=False))),
        pa.field("values", pa.list_(pa.field("element", pa.float64(), nullable=False))),
    ]
)


def from_vectors(column: pa.StructArray, spec: ColumnSpec) -> AnyBlock:
    """Turn vectors into an array, or into a :class:`SparseBlock` where the spec says so.

    Raises
    ------
    RaggedArrayError
        When they have different sizes, or another one than the spec's.
    ValueRangeError
        When the spec's dtype cannot hold a value.
    """
    is_dense = column.field("type").to_numpy() == 1
    values = column.field("values")
    starts = offsets_of(values)
    if is_dense.all() and spec.storage == "dense":
        size = common_length(np.diff(starts), spec, spec.size)
        numbers = values.values.to_numpy()[starts[0] : starts[-1]]
        return cast(numbers.reshape(len(column), size), spec.dtype, spec.name)
    entries = _entries(column, is_dense, spec)
    if spec.storage == "sparse":
        # The zeros of dense rows go, by their bits: a negative zero stays.
        kept = ~is_dense[entries.rows] | (entries.values.view(f"u{entries.values.itemsize}") != 0)
        counts = np.bincount(entries.rows[kept], minlength=len(column))
        return SparseBlock(starts_of(counts), entries.places[kept], entries.values[kept], entries.size)
    block = np.zeros((len(column), entries.size), dtype=spec.dtype)
    block[entries.rows, entries.places] = entries.values
    return block


class _Entries(NamedTuple):
    """The values that vectors hold: in which row, at which place."""

    rows: Block
    places: Block
    values: Block
    size: int


def _entries(column: pa.StructArray, is_dense: npt.NDArray[np.bool_], spec: ColumnSpec) -> _Entries:
    values, indices = column.field("values"), column.field("indices")
    starts = offsets_of(values)
    counts = np.diff(starts)
    sizes = np.where(is_dense, counts, column.field("size").fill_null(0).to_numpy(zero_copy_only=False))
    size = common_length(sizes, spec, spec.size)
    rows = np.repeat(np.arange(len(column)), counts)
    # A dense row has no indices: there a value's place is its distance from the row's first value.
    places = np.arange(starts[0], starts[-1]) - np.repeat(starts[:-1], counts)
    is_sparse = ~is_dense[rows]
    firsts = np.repeat(offsets_of(indices)[:-1], counts)
    places[is_sparse] = indices.values.to_numpy()[(firsts + places)[is_sparse]]
    numbers = cast(values.values.to_numpy()[starts[0] : starts[-1]], spec.dtype, spec.name)
    return _Entries(rows, places.astype(np.int32), numbers, size)


def to_vectors(values: Block) -> pa.StructArray:
    """Turn an array of shape ``(rows, size)`` into dense Spark ML vectors."""
    rows, size = values.shape
    offsets = pa.array(np.arange(rows + 1, dtype=np.int32) * size)
    numbers = pa.array(values.astype(np.float64).reshape(-1))
    return pa.StructArray.from_arrays(
        [
            pa.array(np.ones(rows, dtype=np.int8)),
            pa.nulls(rows, pa.int32()),
            pa.nulls(rows, VECTOR_TYPE[2].type),
            pa.ListArray.from_arrays(offsets, numbers, type=VECTOR_TYPE[3].type),
        ],
        fields=list(VECTOR_TYPE),
    )
