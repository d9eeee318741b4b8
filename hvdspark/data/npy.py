"""Rows as cells in NumPy's ``.npy`` format, which is what Petastorm's ``NdarrayCodec`` writes and reads."""

from __future__ import annotations

import functools
import io
import math
from typing import Any

import numpy as np
import pyarrow as pa

from hvdspark.data.blocks import Block
from hvdspark.plan import Shape

# A view keeps the headers between its rows in memory; up to this share of the values that is cheaper than a copy.
VIEW_GAP = 0.5


def pack(block: Block) -> pa.Array:
    """Store each row of an array as one cell of fixed width.

    With the same header in every cell a whole column is one buffer, which reads several times faster than Parquet
    lists.
    """
    header = npy_header(block.shape[1:], block.dtype)
    row_bytes = math.prod(block.shape[1:]) * block.itemsize
    cells = np.empty((len(block), len(header) + row_bytes), dtype=np.uint8)
    cells[:, : len(header)] = np.frombuffer(header, dtype=np.uint8)
    flat = np.ascontiguousarray(block).reshape(len(block), row_bytes // block.itemsize)
    cells[:, len(header) :] = flat.view(np.uint8).reshape(len(block), row_bytes)
    return pa.Array.from_buffers(pa.binary(cells.shape[1]), len(block), [None, pa.py_buffer(cells)])


def unpack(column: pa.Array, shape: Shape, dtype: str, *, verify: bool = True) -> Block:
    """Turn what :func:`pack` made back into an array; raises ``ValueError`` when it is anything else.

    Parameters
    ----------
    column
        The cells.
    shape, dtype
        What is in them.
    verify
        Whether to look at every cell's header, or at the first one alone.

    Returns
    -------
    ndarray
        Where the headers are small beside the values, a view of the column.
    """
    header = npy_header(shape, np.dtype(dtype))
    width = len(header) + math.prod(shape) * np.dtype(dtype).itemsize
    if column.type != pa.binary(width):
        raise ValueError(f"it is stored as {column.type}, not as {dtype} values of shape {shape}")
    start = column.offset * width
    flat = np.frombuffer(column.buffers()[1], dtype=np.uint8, count=len(column) * width, offset=start)
    cells = flat.reshape(len(column), width)
    if not (cells[: None if verify else 1, : len(header)] == np.frombuffer(header, dtype=np.uint8)).all():
        raise ValueError(f"it has cells that are not {dtype} values of shape {shape}")
    values = cells[:, len(header) :]
    if len(header) > VIEW_GAP * values.shape[1]:
        values = np.ascontiguousarray(values)
    return values.view(dtype).reshape(len(column), *shape)


@functools.lru_cache(maxsize=256)
def npy_header(shape: Shape, dtype: np.dtype[Any], length: int | None = None) -> bytes:
    """Return the ``.npy`` header of an array.

    Source: numpy.lib.format, version 1.0 of the format. It is padded to 16 bytes, or to the length asked for, instead
    of NumPy's 64: readers go by the length it states.
    """
    descr = np.lib.format.dtype_to_descr(dtype)
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}}}".encode()
    spaces = -(len(text) + 11) % 16 if length is None else length - len(text) - 11
    text += b" " * spaces + b"\n"
    out = io.BytesIO()
    out.write(np.lib.format.magic(1, 0) + len(text).to_bytes(2, "little") + text)
    header = out.getvalue()
    assert length in (None, len(header))
    return header
