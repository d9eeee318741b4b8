"""Parquet files that another program wrote, such as Spark, as a dataset to train on where they lie."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow.parquet as pq

from hvdspark.data.arrays import require_fed
from hvdspark.data.foreign import unknown_to_spark
from hvdspark.data.materialize import refuse_nulls
from hvdspark.data.partitions import Layout
from hvdspark.data.summary import Summary, summarize_footers
from hvdspark.errors import CorruptDatasetError, EmptyDatasetError, StoreError
from hvdspark.plan import ColumnSpec, GroupRead, RowGroup
from hvdspark.store import Store

# Footers are small, and far away: what counts is to ask for many at once.
_LOOKERS = 16


def open_parquet(url: str) -> tuple[Store, str | None]:
    """Open a Parquet file or folder.

    Returns
    -------
    store : Store
        The folder.
    file : str or None
        The file's name in it, where the address is that of a file.

    Raises
    ------
    StoreError
        When there is nothing.
    """
    store = Store.create(url)
    if store.filesystem.isfile(store.path()):
        folder, _, name = store.url.rpartition("/")
        return Store.create(folder), name
    if not store.filesystem.isdir(store.path()):
        raise StoreError(f"there is no Parquet file or folder at {url}", url=url)
    return store, None


def columns_unknown_to_spark(url: str) -> dict[str, str]:
    """Name columns of Parquet files that Spark has no type for, and the types that Arrow has for them."""
    store, file = open_parquet(url)
    for path in [file] if file is not None else _files(store):
        found = unknown_to_spark(_footer(store, path))
        if found:
            return found
    return {}


@dataclass(frozen=True)
class Survey:
    """What Parquet files hold.

    Parameters
    ----------
    store
        The folder they are in.
    columns
        The columns to train on, with the shapes of their rows.
    groups
        The row groups; paths are relative to the Store.
    summary
        What tells these rows from others, see :mod:`hvdspark.data.summary`.
    """

    store: Store
    columns: tuple[ColumnSpec, ...]
    groups: tuple[RowGroup, ...]
    summary: Summary


def survey(url: str, columns: Sequence[ColumnSpec]) -> Survey:
    """Look at the footers of Parquet files, and at their first rows, to know what is in them.

    Parameters
    ----------
    url
        A file, or a folder of files.
    columns
        The columns to train on.

    Raises
    ------
    StoreError
        When there is nothing, or files lie in Hive partitions, whose values would be lost.
    EmptyDatasetError
        When there are no rows.
    NullValueError
        When the footers count nulls in a column that has nothing to fill them with; where they do not tell, the ranks
        find out.
    ValueRangeError
        When the smallest or largest value of a column, or one of the first row, is none that the model takes as it is.
    """
    store, file = open_parquet(url)
    paths = [file] if file is not None else list(_files(store))
    with ThreadPoolExecutor(_LOOKERS) as pool:
        footers = list(pool.map(lambda path: _footer(store, path), paths))
    groups = tuple(
        RowGroup(path, index, footer.row_group(index).num_rows)
        for path, footer in zip(paths, footers, strict=True)
        for index in range(footer.num_row_groups)
        if footer.row_group(index).num_rows
    )
    if not groups:
        raise EmptyDatasetError(f"{url} has no rows in {len(paths)} Parquet files")
    _check_statistics(footers, columns)
    # Here and not above, because importing Petastorm takes a second, which other fits need not wait.
    from hvdspark.data.reader import read_group

    foreign = [replace(column, packed=False) for column in columns]
    first = read_group(store, "", foreign, GroupRead(groups[0], ((0, 1),)))
    found = tuple(Layout.of(first[column.name], column.name).applied_to(column) for column in foreign)
    return Survey(store, found, groups, summarize_footers(footers, [column.name for column in columns]))


def _files(store: Store) -> Iterator[str]:
    """Yield the Parquet files of a folder, in order; hidden ones and those of a format's own bookkeeping left out."""
    root = store.path()
    for path in sorted(store.filesystem.find(root)):
        relative = posixpath.relpath(path, root)
        names = relative.split("/")
        if any(name.startswith((".", "_")) for name in names) or not relative.endswith(".parquet"):
            continue
        if any("=" in name for name in names[:-1]):
            raise StoreError(
                f"{store.url} is partitioned into folders ({names[0]}): the values in their names are in no file. Read"
                " it with Spark and fit() the DataFrame.",
                url=store.url,
            )
        yield relative


def _footer(store: Store, path: str) -> pq.FileMetaData:
    try:
        with store.filesystem.open(store.path(path), "rb") as file:
            return pq.read_metadata(file)
    except (OSError, ValueError) as exc:
        raise CorruptDatasetError(f"{store.url_of(path)} cannot be read: {exc}. It is no whole Parquet file.") from exc


def _check_statistics(footers: Iterable[pq.FileMetaData], columns: Sequence[ColumnSpec]) -> None:
    """Refuse nulls that nothing fills and values that the model does not take, as far as the footers tell."""
    looked_at = {column.name: column for column in columns if column.fill is None or column.fed_as}
    nulls: Counter[str] = Counter()
    for footer in footers:
        for name, found in _statistics(footer, list(looked_at)):
            column = looked_at[name]
            if found.has_null_count and column.fill is None:
                nulls[name] += found.null_count
            if column.fed_as and found.has_min_max and type(found.min) is int:
                require_fed(np.array([found.min, found.max]), column)
    refuse_nulls(+nulls)


def _statistics(footer: pq.FileMetaData, names: Sequence[str]) -> Iterator[tuple[str, pq.Statistics]]:
    """Yield what a footer tells of columns that are no structures, row group by row group."""
    # Once for each footer: tables may have thousands of columns, in thousands of files.
    places = {footer.schema.column(index).path: index for index in range(footer.num_columns)}
    for number in range(footer.num_row_groups):
        group = footer.row_group(number)
        for name in names:
            found = group.column(places[name]).statistics if name in places else None
            if found is not None:
                yield name, found
