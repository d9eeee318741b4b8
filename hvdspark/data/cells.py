"""Blocks of rows that are strings of bytes of any length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import pyarrow as pa

from hvdspark.data.blocks import Block, LateBlock, Rows
from hvdspark.plan import Storage


class CellBlock(LateBlock):
    """Strings of bytes, one per row.

    Parameters
    ----------
    cells
        An Arrow array of strings or binaries without nulls.
    """

    def __init__(self, cells: pa.Array) -> None:
        # Wide offsets: narrow ones end at 2 GiB, and a rank may keep more than that.
        self.cells = cells.cast(pa.large_binary())

    @property
    def nbytes(self) -> int:
        """Bytes of the cells and of their offsets."""
        return int(self.cells.nbytes)

    def __len__(self) -> int:
        return len(self.cells)

    def __getitem__(self, rows: Rows) -> Self:
        if isinstance(rows, slice):
            start, stop, step = rows.indices(len(self))
            if step == 1:
                return self._like(self.cells.slice(start, max(stop - start, 0)))
            rows = np.arange(start, stop, step)
        elif rows.dtype == bool:
            return self._like(self.cells.filter(pa.array(rows)))
        return self._like(self.cells.take(pa.array(rows)))

    def joined_to(self, others: Sequence[Self]) -> Self:
        """Return the cells of this block and of others."""
        return self._like(pa.concat_arrays([self.cells, *[other.cells for other in others]]))

    def to_parquet(self) -> pa.Array:
        """Return the cells as they are stored."""
        return self.cells.cast(pa.binary())

    def _like(self, cells: pa.Array) -> Self:
        return type(self)(cells)


class TextBlock(CellBlock):
    """Strings, in UTF-8."""

    @property
    def storage(self) -> Storage:
        """Text."""
        return "text"

    @property
    def dense_row_bytes(self) -> int:
        """Bytes of a row's Python object, about."""
        return 64 + self.nbytes // max(len(self), 1)

    def to_dense(self, dtype: str | None, column: str) -> Block:  # noqa: ARG002  (text is text)
        """Return the strings as an array of ``bytes`` objects of shape ``(rows, 1)``, which TensorFlow takes."""
        found: Any = self.cells.to_numpy(zero_copy_only=False)
        return np.asarray(found, dtype=object).reshape(-1, 1)

    def to_parquet(self) -> pa.Array:
        """Return the strings as Parquet's strings; the bytes are those that Spark gave."""
        return super().to_parquet().view(pa.string())
