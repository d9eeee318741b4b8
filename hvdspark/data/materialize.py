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
import hashlib
import itertools
import json
import pickle
import posixpath
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from hvdspark.data.partitions import TRAIN, VAL, Layout, PartitionReport, PartitionWriter, Split
from hvdspark.data.summary import added
from hvdspark.errors import CorruptDatasetError, EmptyDatasetError, NullValueError, RaggedArrayError, StoreError
from hvdspark.plan import ColumnSpec, Manifest, RowGroup
from hvdspark.shelf import DATASETS
from hvdspark.store import Store

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

MANIFEST = "manifest.json"


def dataset_key(source: str, columns: Sequence[ColumnSpec], split: Split) -> str:
    """Return the digest of all that a dataset's content depends on.

    Parameters
    ----------
    source
        The DataFrame's :func:`~hvdspark.data.fingerprint.fingerprint`: the query, and the state of what it reads.
    columns, split
        What is stored of it. The version of the format counts as well.
    """
    parts = [Manifest.VERSION, source, [dataclasses.asdict(column) for column in columns], dataclasses.asdict(split)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def materialize(
    df: DataFrame, columns: Sequence[ColumnSpec], split: Split, store: Store, dataset: str | None = None
) -> tuple[str, Manifest]:
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
    dataset
        Folder of the dataset, relative to the Store, that does not exist; by default a new one.

    Returns
    -------
    dataset : str
        The folder.
    manifest : Manifest
        What it holds.

    Raises
    ------
    EmptyDatasetError, NullValueError, RaggedArrayError, ValueRangeError
        When the rows cannot be trained on; nothing stays in the Store then.
    """
    dataset = dataset or posixpath.join(DATASETS, uuid.uuid4().hex)
    try:
        writer = PartitionWriter(tuple(columns), split, store.ref(), dataset)
        wanted = split.names_read(columns)
        found = by_position(df, wanted).mapInArrow(_task_of(writer, wanted), "report string").collect()
        reports = [PartitionReport.from_json(row["report"]) for row in found]
        manifest = merge(columns, reports, split)
        sizes: dict[str, int] = {}
        for name, groups in manifest.splits.items():
            if groups:
                sizes |= _sizes_of(store, dataset, name, groups)
                _write_petastorm_metadata(store, posixpath.join(dataset, name), manifest.columns, groups)
        manifest = dataclasses.replace(manifest, sizes=sizes)
        store.publish_bytes(manifest.to_json().encode(), dataset, MANIFEST)
    except BaseException:
        # What went wrong must not be hidden by what its cleaning up meets.
        with contextlib.suppress(StoreError):
            store.delete(dataset)
        raise
    return dataset, manifest


def _sizes_of(store: Store, dataset: str, split: str, groups: Sequence[RowGroup]) -> dict[str, int]:
    """Return the sizes of the files that the executors wrote; this process must see them."""
    sizes = {f"{split}/{name}": size for name, size in store.sizes(dataset, split).items()}
    written = {group.path for group in groups}
    missing = written - sizes.keys()
    if missing:
        raise StoreError(
            f"the executors wrote {store.url_of(dataset, min(missing))}, but the driver does not see it: {store.url} is"
            " a folder of each machine's own. Give a Store on a file system that all of them share.",
            url=store.url,
        )
    return {path: sizes[path] for path in written}


def load_manifest(store: Store, dataset: str) -> Manifest:
    """Read a dataset's manifest.

    Parameters
    ----------
    store
        Where the dataset is.
    dataset
        Its folder, relative to the Store; an empty one is the Store itself.

    Raises
    ------
    CorruptDatasetError
        When it has none, so that it is not whole, or names files that are not in its folder.
    """
    place = posixpath.join(dataset, MANIFEST)
    if not store.exists(place):
        raise CorruptDatasetError(
            f"there is no {store.url_of(place)}: the dataset was not written to its end, or hvdspark did not write it"
        )
    try:
        manifest = Manifest.from_json(store.read_bytes(place).decode())
        for group in itertools.chain.from_iterable(manifest.splits.values()):
            _check_group(store, dataset, group)
    except (ValueError, KeyError, TypeError, AttributeError) as exc:
        raise CorruptDatasetError(
            f"{store.url_of(place)} is not a manifest that this version reads: {exc!r}; run fit() again to write the"
            " dataset anew"
        ) from exc
    return manifest


def _check_group(store: Store, dataset: str, group: RowGroup) -> None:
    """Check what a manifest says of a row group; raises :class:`ValueError` where it leads out of the dataset."""
    store.path(*([dataset] if dataset else []), group.path)
    if not all(type(number) is int and number >= 0 for number in (group.index, group.rows)):
        raise ValueError(f"row group {group.index!r} with {group.rows!r} rows")


def require_files(store: Store, dataset: str, manifest: Manifest) -> None:
    """Check that the files of a dataset are there as they were written, without opening them.

    Raises
    ------
    CorruptDatasetError
        When one is missing or has another size.
    """
    paths = {group.path for groups in manifest.splits.values() for group in groups}
    found = {
        posixpath.join(folder, name): size
        for folder in {posixpath.dirname(path) for path in paths}
        for name, size in store.sizes(*filter(None, (dataset, folder))).items()
    }
    for path in sorted(paths):
        url = store.url_of(posixpath.join(dataset, path))
        if path not in found:
            raise CorruptDatasetError(f"{url} is missing, though the dataset's manifest names it")
        expected = manifest.sizes.get(path)
        if expected is not None and found[path] != expected:
            raise CorruptDatasetError(f"{url} has {found[path]} bytes, but {expected} were written: it was changed")


def by_position(df: DataFrame, names: Sequence[str]) -> DataFrame:
    """Select columns and name them ``c0``, ``c1``, and so on.

    PySpark takes a name with dots for an access to a field, in some places even when it is quoted.
    """
    quoted = [f"`{name.replace('`', '``')}`" for name in names]
    return df.select(*quoted).toDF(*[f"c{place}" for place in range(len(names))])


def _task_of(
    writer: PartitionWriter, names: Sequence[str]
) -> Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """Make the function that Spark calls with a partition's batches, whose columns come in the order of the names."""

    def write(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        report = writer.write(batch.rename_columns(list(names)) for batch in batches)
        yield pa.RecordBatch.from_pydict({"report": [report.to_json()]})

    return write


def merge(columns: Sequence[ColumnSpec], reports: Iterable[PartitionReport], split: Split) -> Manifest:
    """Check what the tasks found and list their row groups in partition order."""
    ordered = sorted(reports, key=lambda report: report.partition)
    refuse_nulls(_total(report.nulls for report in ordered))
    layouts = _common_layouts(columns, ordered)
    splits = {
        name: tuple(group for report in ordered for group in report.groups.get(name, ())) for name in (TRAIN, VAL)
    }
    manifest = Manifest(
        columns=tuple(layouts[spec.name].applied_to(spec) if spec.name in layouts else spec for spec in columns),
        splits=splits,
        summary=added(report.summary for report in ordered),
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


def refuse_nulls(counts: Mapping[str, int]) -> None:
    """Raise :class:`NullValueError` where any column has nulls that nothing fills."""
    if counts:
        name, count = max(counts.items(), key=lambda item: item[1])
        others = f" (also: {', '.join(sorted(set(counts) - {name}))})" if len(counts) > 1 else ""
        raise NullValueError(
            f"column '{name}' has {count} nulls{others}. Nulls are refused, because no number stands for them: drop"
            f" the rows (df.dropna()), fill them (fill_nulls={{'{name}': …}}, df.fillna(), Imputer), or select other"
            " columns.",
            column=name,
            count=count,
        )


def _total(counts: Iterable[Mapping[str, int]]) -> Mapping[str, int]:
    total: Counter[str] = Counter()
    for found in counts:
        total.update(found)
    return total


def _common_layouts(columns: Sequence[ColumnSpec], reports: Iterable[PartitionReport]) -> dict[str, Layout]:
    """Return how each column's rows are, the same in every partition."""
    layouts: dict[str, Layout] = {}
    for report in reports:
        for exc in report.refused.values():
            raise exc
        for name, layout in report.layouts.items():
            layouts.setdefault(name, layout).require_same(name, layout)
    empty = [spec.name for spec in columns if spec.name in layouts and 0 in layouts[spec.name].shape]
    if empty:
        raise RaggedArrayError(
            f"column '{empty[0]}' holds empty arrays; give arrays with at least one value",
            column=empty[0],
            lengths=(1, 0),
        )
    return layouts


def _write_petastorm_metadata(
    store: Store, folder: str, columns: Sequence[ColumnSpec], groups: Sequence[RowGroup]
) -> None:
    """Write ``_common_metadata``, by which Petastorm's own readers know the columns and row groups.

    It holds a pickled Unischema, as Petastorm's format wants it. Only Petastorm's readers look at it; this library
    never loads it (its own metadata is the JSON manifest).
    """
    # Here and not above, because importing Petastorm takes a second, which the writing tasks need not wait.
    from hvdspark.data.petastorm_compat import ROW_GROUPS_PER_FILE_KEY, UNISCHEMA_KEY
    from hvdspark.data.petastorm_schema import arrow_schema, unischema

    counts: dict[str, int] = {}
    for group in groups:
        name = posixpath.basename(group.path)
        counts[name] = counts.get(name, 0) + 1
    metadata = {
        UNISCHEMA_KEY: pickle.dumps(unischema(columns)),
        ROW_GROUPS_PER_FILE_KEY: json.dumps(counts).encode(),
    }
    sink = pa.BufferOutputStream()
    pq.write_metadata(arrow_schema(columns).with_metadata(metadata), sink)
    store.publish_bytes(sink.getvalue().to_pybytes(), folder, "_common_metadata")
