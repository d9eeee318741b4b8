"""What a Spark task does with its partition's rows: check them, split them, write them, and report what it wrote.

The names of its files are used by no other attempt at the same task, so that those of failed or speculative attempts
can lie about and are never read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import posixpath
import uuid
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hvdspark.data.arrays import Block, count_nulls, pack, to_block
from hvdspark.errors import NullValueError, RaggedArrayError, ValueRangeError
from hvdspark.plan import ColumnSpec, RowGroup, StoreRef
from hvdspark.store import Store

TRAIN, VAL = "train", "val"

# A row group is read and decoded as a whole: large enough that Parquet's fixed costs vanish, small enough that a
# shuffle over several of them fits into a rank's memory.
ROW_GROUP_BYTES = 16 << 20
MAX_ROW_GROUP_ROWS = 1 << 18


@dataclass(frozen=True)
class Split:
    """How rows are told into training and validation.

    Parameters
    ----------
    fraction
        Share of the rows to validate on, chosen at random by the seed.
    column
        Or a column: rows where it is true (not zero) are for validation.
    seed
        Seed of the choice; the same DataFrame, partitioning and seed give the same rows.
    """

    fraction: float = 0.0
    column: str | None = None
    seed: int = 0

    @property
    def has_val(self) -> bool:
        """Whether any row may go to validation."""
        return self.fraction > 0 or self.column is not None


@dataclass
class PartitionReport:
    """What one task wrote and what it found, as it travels to the driver."""

    partition: int
    groups: dict[str, list[RowGroup]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    nulls: dict[str, int] = field(default_factory=dict)
    ragged: dict[str, tuple[int, int]] = field(default_factory=dict)
    too_large: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Write the report as JSON text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> PartitionReport:
        """Read what :meth:`to_json` wrote."""
        data = json.loads(text)
        groups = {name: [RowGroup(**group) for group in found] for name, found in data["groups"].items()}
        ragged = {name: (first, second) for name, (first, second) in data["ragged"].items()}
        return cls(data["partition"], groups, data["sizes"], data["nulls"], ragged, data["too_large"])


@dataclass(frozen=True)
class PartitionWriter:
    """Writes one partition; an instance travels to every task."""

    columns: tuple[ColumnSpec, ...]
    split: Split
    store: StoreRef
    dataset: str

    def write(self, batches: Iterable[pa.RecordBatch]) -> PartitionReport:
        """Write the partition's batches; a file that is not finished is removed when anything goes wrong."""
        from pyspark import TaskContext

        context = TaskContext.get()
        partition = context.partitionId() if context is not None else 0
        report = PartitionReport(partition)
        random = np.random.default_rng([self.split.seed, partition])
        # The random part keeps attempts of one task apart, wherever and whenever they run.
        stem = f"part-{partition:05d}-{uuid.uuid4().hex[:12]}.parquet"
        files = {name: _SplitFile(Store.from_ref(self.store), self.dataset, f"{name}/{stem}") for name in (TRAIN, VAL)}
        try:
            for batch in batches:
                blocks = self._blocks(batch, report)
                held_out = self._held_out(batch, random, report)
                if blocks is None:
                    continue
                for name, mask in ((TRAIN, ~held_out), (VAL, held_out)):
                    if mask.any():
                        chosen = blocks if mask.all() else {key: block[mask] for key, block in blocks.items()}
                        files[name].append(chosen)
            for name, file in files.items():
                report.groups[name] = file.close()
        finally:
            for file in files.values():
                file.abort()
        return report

    def _blocks(self, batch: pa.RecordBatch, report: PartitionReport) -> dict[str, Block] | None:
        """Convert a batch; where a column cannot be, note why and go on, so that all nulls are counted."""
        blocks = {}
        for spec in self.columns:
            column = batch.column(spec.name)
            size = report.sizes.get(spec.name, spec.size)
            try:
                blocks[spec.name] = to_block(column, dataclasses.replace(spec, size=size))
            except NullValueError as exc:
                report.nulls[spec.name] = report.nulls.get(spec.name, 0) + exc.count
                continue
            except RaggedArrayError as exc:
                report.ragged.setdefault(spec.name, exc.lengths)
                continue
            except ValueRangeError as exc:
                report.too_large.setdefault(spec.name, exc.dtype)
                continue
            if batch.num_rows:
                report.sizes[spec.name] = blocks[spec.name].shape[1]
        # Empty arrays are refused once the sizes of all partitions are known.
        unusable = report.nulls or report.ragged or report.too_large or 0 in report.sizes.values()
        return None if unusable or not batch.num_rows else blocks

    def _held_out(self, batch: pa.RecordBatch, random: np.random.Generator, report: PartitionReport) -> Block:
        """Mark the batch's validation rows."""
        if self.split.column is None:
            return np.asarray(random.random(batch.num_rows) < self.split.fraction)
        column = batch.column(self.split.column)
        nulls = count_nulls(column, ColumnSpec(self.split.column, "scalar", "bool"))
        if nulls:
            report.nulls[self.split.column] = report.nulls.get(self.split.column, 0) + nulls
        nothing = False if pa.types.is_boolean(column.type) else 0
        return np.asarray(column.fill_null(nothing).to_numpy(zero_copy_only=False) != 0)


class _SplitFile:
    """One Parquet file, opened with its first rows and cut into row groups of a fixed number of rows."""

    def __init__(self, store: Store, dataset: str, name: str) -> None:
        self._store = store
        self._path = store.path(dataset, name)
        self._name = name
        self._buffer: list[dict[str, Block]] = []
        self._buffered = 0
        self._group_rows = 0
        self._groups: list[RowGroup] = []
        self._stream: Any = None
        self._writer: pq.ParquetWriter | None = None

    def append(self, blocks: dict[str, Block]) -> None:
        if not self._group_rows:
            width = sum(block.shape[1] * block.itemsize for block in blocks.values())
            self._group_rows = int(np.clip(ROW_GROUP_BYTES // width, 1, MAX_ROW_GROUP_ROWS))
        self._buffer.append(blocks)
        self._buffered += len(next(iter(blocks.values())))
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
        names = list(self._buffer[0])
        whole = {name: np.concatenate([blocks[name] for blocks in self._buffer]) for name in names}
        table = _to_table({name: block[:rows] for name, block in whole.items()})
        self._open(table.schema).write_table(table, row_group_size=rows)
        self._groups.append(RowGroup(self._name, len(self._groups), rows))
        self._buffered -= rows
        self._buffer = [{name: block[rows:] for name, block in whole.items()}] if self._buffered else []

    def _open(self, schema: pa.Schema) -> pq.ParquetWriter:
        if self._writer is None:
            filesystem = self._store.filesystem
            filesystem.makedirs(posixpath.dirname(self._path), exist_ok=True)
            self._stream = filesystem.open(self._path, "wb")
            # Measured features hardly repeat: a dictionary costs a third of the writing time and saves nothing.
            self._writer = pq.ParquetWriter(
                self._stream, schema, compression="snappy", use_dictionary=False, write_page_checksum=True
            )
        return self._writer


def _to_table(blocks: dict[str, Block]) -> pa.Table:
    """Scalars as Parquet numbers; anything wider as one packed cell per row."""
    columns = {name: pa.array(block[:, 0]) if block.shape[1] == 1 else pack(block) for name, block in blocks.items()}
    return pa.table(columns)
