"""Files of row groups: Parquet in a Store, Arrow on a local disk."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hvdspark.data.blocks import Blocks, join, row_count, size_bytes
from hvdspark.data.storage import to_parquet
from hvdspark.plan import RowGroup
from hvdspark.store import Store

PARQUET, ARROW = ".parquet", ".arrow"

# A row group is read and decoded as a whole: large enough that Parquet's fixed costs vanish, small enough that a
# shuffle over several of them fits into a rank's memory.
ROW_GROUP_BYTES = 16 << 20
MAX_ROW_GROUP_ROWS = 1 << 18


class RowFile:
    """One file of row groups, opened with its first rows.

    Parameters
    ----------
    store
        Where it goes.
    dataset
        The dataset's folder, relative to the Store.
    name
        The file's path in it; a name that ends in ``.arrow`` makes an Arrow file of record batches, which needs no
        decoding and so is for local disks, any other a Parquet file.
    """

    def __init__(self, store: Store, dataset: str, name: str) -> None:
        self._store = store
        self._path = store.path(dataset, name)
        self._dataset = dataset
        self._name = name
        self._buffer: list[Blocks] = []
        self._buffered = 0
        self._group_rows = 0
        self._groups: list[RowGroup] = []
        self._stream: Any = None
        self._writer: Any = None

    def append(self, blocks: Blocks) -> None:
        """Add rows."""
        rows = row_count(blocks)
        # Rows of images or sparse vectors differ: a group has as many as would fit if all were like these.
        self._group_rows = int(np.clip(ROW_GROUP_BYTES * rows // max(size_bytes(blocks), 1), 1, MAX_ROW_GROUP_ROWS))
        self._buffer.append(blocks)
        self._buffered += rows
        while self._buffered >= self._group_rows:
            self._flush(self._group_rows)

    def close(self) -> list[RowGroup]:
        """Finish the file and return its row groups; without rows there is no file."""
        if self._buffered:
            self._flush(self._buffered)
        if self._writer is not None:
            self._writer.close()
            self._writer = None
            self._stream.close()
            self._stream = None
        return self._groups

    def abort(self) -> None:
        """Drop an unfinished file; does nothing after :meth:`close`."""
        if self._stream is not None:
            stream, writer = self._stream, self._writer
            self._stream = self._writer = None
            # Whatever closing meets, the file goes; but a writer that is left open complains when it is collected.
            with contextlib.suppress(OSError, ValueError):
                if writer is not None:
                    writer.close()
            with contextlib.suppress(OSError, ValueError):
                stream.close()
            self._store.filesystem.rm_file(self._path)

    def _flush(self, rows: int) -> None:
        whole = join(self._buffer)
        table = pa.table({name: to_parquet(block[:rows]) for name, block in whole.items()})
        self._open(table.schema).write_table(table, rows)
        self._groups.append(RowGroup(self._name, len(self._groups), rows))
        self._buffered -= rows
        self._buffer = [{name: block[rows:] for name, block in whole.items()}] if self._buffered else []

    def _open(self, schema: pa.Schema) -> Any:
        if self._writer is None:
            self._stream = self._store.open_file(self._dataset, self._name)
            if self._path.endswith(ARROW):
                self._writer = pa.ipc.new_file(self._stream, schema)
            else:
                # Measured features hardly repeat: a dictionary costs a third of the writing time and saves nothing.
                self._writer = pq.ParquetWriter(
                    self._stream, schema, compression="snappy", use_dictionary=False, write_page_checksum=True
                )
        return self._writer


def read_columns(
    store: Store, path: str, index: int, names: Sequence[str], *, verify: bool = True
) -> dict[str, pa.Array]:
    """Read columns of one row group.

    Parameters
    ----------
    store
        Where the file is.
    path
        The file, relative to the Store.
    index
        Number of the row group in it.
    names
        The columns.
    verify
        Whether to check the checksums of a Parquet file's pages.

    Raises
    ------
    OSError, ValueError, IndexError, KeyError
        When the file is missing or damaged.
    """
    place = store.path(path)
    if place.endswith(ARROW):
        with pa.memory_map(place) as source:
            batch = pa.ipc.open_file(source).get_batch(index)
        return {name: batch.column(name) for name in names}
    source = place if store.is_local else store.filesystem.open(place, "rb")
    # Spark's timestamps go beyond what nanoseconds can count.
    options = {"page_checksum_verification": verify, "coerce_int96_timestamp_unit": "us"}
    with pq.ParquetFile(source, memory_map=store.is_local, **options) as parquet:
        table = parquet.read_row_group(index, list(names), use_threads=False)
    return {name: _whole(table.column(name)) for name in names}


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
