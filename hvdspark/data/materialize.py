"""A DataFrame to a Petastorm Parquet dataset, in one pass over the rows.

Each Spark task writes its partition's rows to files of its own in the Store, with names that no other attempt
uses, and reports what it wrote. The driver puts the reports of the attempts that Spark accepted into the manifest and
publishes it last. So a dataset without a manifest is not whole, files of failed or speculative attempts are never
read, and exact row counts are known without opening a file again.

Both folders, ``train`` and ``val``, are Petastorm datasets: any ``petastorm.make_reader`` or ``make_batch_reader``
opens them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import pickle
import posixpath
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hvdspark.data.arrays import Block, count_nulls, pack, to_block
from hvdspark.errors import CorruptDatasetError, EmptyDatasetError, NullValueError, RaggedArrayError
from hvdspark.plan import ColumnSpec, Manifest, RowGroup, StoreRef
from hvdspark.store import Store

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

logger = logging.getLogger(__name__)

DATASETS = "datasets"
MANIFEST = "manifest.json"
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

    def to_json(self) -> str:
        """Write the report as JSON text."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> PartitionReport:
        """Read what :meth:`to_json` wrote."""
        data = json.loads(text)
        groups = {name: [RowGroup(**group) for group in found] for name, found in data["groups"].items()}
        ragged = {name: (first, second) for name, (first, second) in data["ragged"].items()}
        return cls(data["partition"], groups, data["sizes"], data["nulls"], ragged)


def materialize(df: DataFrame, columns: Sequence[ColumnSpec], split: Split, store: Store) -> tuple[str, Manifest]:
    """Write a DataFrame's columns as a dataset in the Store.

    Parameters
    ----------
    df
        The rows.
    columns
        What to store of them.
    split
        Which rows are held out.
    store
        Where to write.

    Returns
    -------
    dataset : str
        Folder of the dataset, relative to the Store.
    manifest : Manifest
        What it holds.

    Raises
    ------
    EmptyDatasetError, NullValueError, RaggedArrayError
        When the rows cannot be trained on; nothing stays in the Store then.
    """
    dataset = posixpath.join(DATASETS, uuid.uuid4().hex)
    names = [column.name for column in columns]
    extra = [split.column] if split.column is not None and split.column not in names else []
    try:
        writer = _PartitionWriter(tuple(columns), split, store.ref(), dataset)
        wanted = [*names, *extra]
        # By position: PySpark takes a name with dots for an access to a field, in some places even when it is quoted.
        rows = df.select(*[_quote(name) for name in wanted]).toDF(*[f"c{place}" for place in range(len(wanted))])
        task = _task_of(writer, wanted)
        reports = [PartitionReport.from_json(row["report"]) for row in rows.mapInArrow(task, "report string").collect()]
        manifest = _merge(columns, reports, split)
        for name, groups in manifest.splits.items():
            if groups:
                _write_petastorm_metadata(store, posixpath.join(dataset, name), manifest.columns, groups)
        store.publish_bytes(manifest.to_json().encode(), dataset, MANIFEST)
    except BaseException:
        # What went wrong must not be hidden by what its cleaning up meets.
        with contextlib.suppress(OSError):
            store.delete(dataset)
        raise
    return dataset, manifest


def load_manifest(store: Store, dataset: str) -> Manifest:
    """Read a dataset's manifest.

    Raises
    ------
    CorruptDatasetError
        When it has none, so that it is not whole.
    """
    if not store.exists(dataset, MANIFEST):
        raise CorruptDatasetError(
            f"{store.url_of(dataset)} has no {MANIFEST}: it was not written to its end, or this machine does not see"
            " the same Store as the one that wrote it"
        )
    try:
        return Manifest.from_json(store.read_bytes(dataset, MANIFEST).decode())
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise CorruptDatasetError(
            f"{store.url_of(dataset, MANIFEST)} is not a manifest that this version reads: {exc!r}; run fit() again to"
            " write the dataset anew"
        ) from exc


def _quote(name: str) -> str:
    """Keep dots in a column's name from being read as field access."""
    return f"`{name.replace('`', '``')}`"


def _task_of(
    writer: _PartitionWriter, names: Sequence[str]
) -> Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """Make the function that Spark calls with a partition's batches, whose columns come in the order of the names."""

    def write(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        report = writer.write(batch.rename_columns(list(names)) for batch in batches)
        yield pa.RecordBatch.from_pydict({"report": [report.to_json()]})

    return write


@dataclass(frozen=True)
class _PartitionWriter:
    """Writes one partition; an instance travels to every task."""

    columns: tuple[ColumnSpec, ...]
    split: Split
    store: StoreRef
    dataset: str

    def write(self, batches: Iterable[pa.RecordBatch]) -> PartitionReport:
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
            if batch.num_rows:
                report.sizes[spec.name] = blocks[spec.name].shape[1]
        # Empty arrays are refused once the sizes of all partitions are known.
        unusable = report.nulls or report.ragged or 0 in report.sizes.values()
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
            stream, self._stream, self._writer = self._stream, None, None
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


def _merge(columns: Sequence[ColumnSpec], reports: Iterable[PartitionReport], split: Split) -> Manifest:
    """Check what the tasks found and list their row groups in partition order."""
    ordered = sorted(reports, key=lambda report: report.partition)
    _refuse_nulls(ordered)
    sizes = _common_sizes(columns, ordered)
    splits = {
        name: tuple(group for report in ordered for group in report.groups.get(name, ())) for name in (TRAIN, VAL)
    }
    manifest = Manifest(
        columns=tuple(dataclasses.replace(spec, size=sizes.get(spec.name, spec.size)) for spec in columns),
        splits=splits,
    )
    train, val = manifest.rows(TRAIN), manifest.rows(VAL)
    if train + val == 0:
        raise EmptyDatasetError("the DataFrame is empty: there is no row to train on. Check its filters and joins.")
    if train == 0:
        raise EmptyDatasetError(f"all {val} rows went to validation; lower validation or give more rows")
    if split.has_val and val == 0:
        raise EmptyDatasetError(
            f"none of the {train} rows went to validation; raise validation, give more rows, or pass validation=None"
        )
    return manifest


def _refuse_nulls(reports: Iterable[PartitionReport]) -> None:
    counts: dict[str, int] = {}
    for report in reports:
        for name, count in report.nulls.items():
            counts[name] = counts.get(name, 0) + count
    if counts:
        name, count = max(counts.items(), key=lambda item: item[1])
        others = f" (also: {', '.join(sorted(set(counts) - {name}))})" if len(counts) > 1 else ""
        raise NullValueError(
            f"column '{name}' has {count} nulls{others}. Nulls are refused, because no number stands for them: drop"
            " the rows (df.dropna()), fill them (df.fillna(), Imputer), or select other columns.",
            column=name,
            count=count,
        )


def _common_sizes(columns: Sequence[ColumnSpec], reports: Iterable[PartitionReport]) -> dict[str, int]:
    """Return each column's values per row, the same in every partition."""
    sizes: dict[str, int] = {}
    for report in reports:
        for name, lengths in report.ragged.items():
            raise _ragged(name, lengths)
        for name, size in report.sizes.items():
            if sizes.setdefault(name, size) != size:
                raise _ragged(name, (sizes[name], size))
    empty = [spec.name for spec in columns if sizes.get(spec.name) == 0]
    if empty:
        raise RaggedArrayError(
            f"column '{empty[0]}' holds empty arrays; give arrays with at least one value",
            column=empty[0],
            lengths=(1, 0),
        )
    return sizes


def _ragged(name: str, lengths: tuple[int, int]) -> RaggedArrayError:
    return RaggedArrayError(
        f"column '{name}' has rows of different lengths: expected {lengths[0]} values, found {lengths[1]}. All rows"
        " of a column need the same length: pad or cut the arrays before fit().",
        column=name,
        lengths=lengths,
    )


def _write_petastorm_metadata(
    store: Store, folder: str, columns: Sequence[ColumnSpec], groups: Sequence[RowGroup]
) -> None:
    """Write ``_common_metadata``, by which Petastorm's own readers know the columns and row groups.

    It holds a pickled Unischema, as Petastorm's format wants it. Only Petastorm's readers look at it; this library
    never loads it (its own metadata is the JSON manifest).
    """
    # Here and not above, because importing Petastorm takes a second, which the writing tasks need not wait.
    from pyspark.sql import types as T

    from hvdspark.data.petastorm_compat import (
        ROW_GROUPS_PER_FILE_KEY,
        UNISCHEMA_KEY,
        NdarrayCodec,
        ScalarCodec,
        Unischema,
        UnischemaField,
    )

    spark_types = {
        "bool": T.BooleanType(),
        "int8": T.ByteType(),
        "int16": T.ShortType(),
        "int32": T.IntegerType(),
        "int64": T.LongType(),
        "float32": T.FloatType(),
        "float64": T.DoubleType(),
    }
    fields, arrow_fields = [], []
    for spec in columns:
        dtype = np.dtype(spec.dtype)
        if spec.size == 1:
            fields.append(UnischemaField(spec.name, dtype.type, (), ScalarCodec(spark_types[spec.dtype]), False))
            arrow_fields.append(pa.field(spec.name, pa.from_numpy_dtype(dtype)))
        else:
            fields.append(UnischemaField(spec.name, dtype.type, (spec.size,), NdarrayCodec(), False))
            arrow_fields.append(pa.field(spec.name, pa.binary()))
    counts: dict[str, int] = {}
    for group in groups:
        name = posixpath.basename(group.path)
        counts[name] = counts.get(name, 0) + 1
    metadata = {
        UNISCHEMA_KEY: pickle.dumps(Unischema("hvdspark", fields)),
        ROW_GROUPS_PER_FILE_KEY: json.dumps(counts).encode(),
    }
    sink = pa.BufferOutputStream()
    pq.write_metadata(pa.schema(arrow_fields, metadata=metadata), sink)
    store.publish_bytes(sink.getvalue().to_pybytes(), folder, "_common_metadata")
