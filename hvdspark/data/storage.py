"""Blocks to the columns of a Parquet file and back."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa

from hvdspark.data.arrays import require_fed, to_block
from hvdspark.data.blocks import AnyBlock
from hvdspark.data.cells import CellBlock, TextBlock
from hvdspark.data.foreign import as_spark_has
from hvdspark.data.images import ImageBlock
from hvdspark.data.npy import pack, unpack
from hvdspark.data.sparse import SparseBlock
from hvdspark.plan import ColumnSpec


def to_parquet(block: AnyBlock) -> pa.Array:
    """Return the column that stores a block: a Parquet number for one value per row, else a cell per row."""
    if isinstance(block, SparseBlock | CellBlock):
        return block.to_parquet()
    assert isinstance(block, np.ndarray)
    return pa.array(block.reshape(-1)) if math.prod(block.shape[1:]) == 1 else pack(block)


def from_parquet(column: pa.Array, spec: ColumnSpec, *, verify: bool = True) -> AnyBlock:
    """Read what :func:`to_parquet` made, or another program; raises ``ValueError`` when it is not what the spec says.

    Without ``verify``, cells of fixed width are taken for what the first one is, and values for ones that the model
    takes.
    """
    if not spec.packed:
        try:
            return to_block(as_spark_has(column), spec)
        except pa.ArrowException as exc:
            raise ValueError(f"column '{spec.name}', which is stored as {column.type}: {exc}") from exc
    try:
        block = _read(column, spec, verify=verify)
    except ValueError as exc:
        raise ValueError(f"column '{spec.name}': {exc}") from exc
    if verify:
        require_fed(block, spec)
    return block


def _read(column: pa.Array, spec: ColumnSpec, *, verify: bool) -> AnyBlock:
    shape = spec.row_shape
    assert shape is not None
    if spec.storage == "dense" and spec.size != 1:
        return unpack(column, shape, spec.dtype, verify=verify)
    if spec.storage == "dense":
        values = np.asarray(column.to_numpy(zero_copy_only=spec.dtype != "bool"))
        if values.dtype != spec.dtype:
            raise ValueError(f"it is stored as {values.dtype}, not as {spec.dtype}")
        return values.reshape(-1, *shape)
    expected = pa.string() if spec.storage == "text" else pa.binary()
    if column.type != expected:
        raise ValueError(f"it is stored as {column.type}, not as {expected}")
    if spec.storage == "sparse":
        return SparseBlock.from_parquet(column, shape[0], spec.dtype)
    return TextBlock(column) if spec.storage == "text" else ImageBlock(column, spec.storage)
