"""Columns of every kind as real Spark gives them, and as the ranks read them, on each of the ways that rows go."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from column_kinds import Column, plan_of, rows_of, schema_of, wide_rows
from hypothesis import HealthCheck, Phase, given, settings
from pyspark.sql import DataFrame, SparkSession

from hvdspark import Store
from hvdspark.data.feed import fed_stage
from hvdspark.data.materialize import materialize
from hvdspark.data.parquet import survey
from hvdspark.data.partitions import TRAIN, Split
from hvdspark.data.planning import FitDraft
from hvdspark.data.reader import ShardReader
from hvdspark.data.shards import plan_shards, reads_of
from hvdspark.plan import BatchSpec, ColumnSpec, RowGroup

Plan = tuple[tuple[ColumnSpec, ...], BatchSpec]
Columns = dict[str, Column]
Read = list[dict[str, Any]]

# A job takes seconds whatever its rows, and columns cost little: so many tables are put side by side.
TABLES = 8


def drawn() -> tuple[Columns, list[tuple[Any, ...]]]:
    """Draw tables of all kinds of columns, and put them side by side."""
    found: list[Any] = []

    # No search for a smaller example that fails: there is none that fails before Spark has seen them all.
    @settings(max_examples=TABLES, phases=[Phase.generate], database=None, suppress_health_check=list(HealthCheck))
    @given(wide_rows())
    def keep(table: Any) -> None:
        found.append(table)

    keep()
    columns = {f"t{number}{name}": column for number, (own, _) in enumerate(found) for name, column in own.items()}
    return columns, [
        tuple(value for row in rows for value in row) for rows in zip(*[own for _, own in found], strict=True)
    ]


def read(store: Store, dataset: str, columns: Sequence[ColumnSpec], groups: tuple[RowGroup, ...]) -> Read:
    with ShardReader(store, dataset, columns, reads_of(plan_shards(groups, 1, 4, keep_order=True), 0)) as reader:
        return list(reader)


def through_a_dataset(df: DataFrame, plan: Plan, folder: Path) -> Read:
    store = Store.create(folder)
    dataset, manifest = materialize(df, plan[0], Split(), store)
    return read(store, dataset, manifest.columns, manifest.splits[TRAIN])


def through_files_of_spark(df: DataFrame, plan: Plan, folder: Path) -> Read:
    path = str(folder / "rows")
    df.write.parquet(path)
    found = survey(path, plan[0])
    return read(found.store, "", found.columns, found.groups)


def straight_to_a_rank(df: DataFrame, plan: Plan, folder: Path) -> Read:
    columns, batch = plan
    draft = FitDraft("run", Store.create(folder).ref(), columns, batch, Split(), 1, 4, 4, 1, False, 0)
    stage = fed_stage(df, draft)
    feed = stage.feed

    def task(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        with feed.taken(batches) as taken:
            plan = taken.plan([taken.report])
            store = Store.from_ref(plan.data)
            with ShardReader(store, plan.dataset, plan.columns, reads_of(plan.train, 0)) as reader:
                yield pa.RecordBatch.from_pydict({"blocks": [pickle.dumps(list(reader))]})

    [row] = stage.frame.mapInArrow(task, "blocks binary").collect()
    found: Read = pickle.loads(row["blocks"])
    return found


@pytest.mark.parametrize("way", [through_a_dataset, through_files_of_spark, straight_to_a_rank])
def test_every_value_of_every_kind_comes_out_of_spark_as_it_went_in(
    spark: SparkSession, tmp_path: Path, way: Callable[[DataFrame, Plan, Path], Read]
) -> None:
    columns, rows = drawn()
    df = spark.createDataFrame(spark.sparkContext.parallelize(rows, 2), schema_of(columns))
    blocks = way(df, plan_of(columns), tmp_path)
    # The Parquet writer of Java knows a single NaN.
    seen = one_nan if way is through_files_of_spark else lambda bits: bits
    found = {name: [seen(bits) for item in blocks for bits in rows_of(item[name])] for name in columns}
    expected = {
        name: [seen(column.row(row[place])) for row in rows] for place, (name, column) in enumerate(columns.items())
    }
    for place, (name, column) in enumerate(columns.items()):
        assert Counter(found[name]) == Counter(expected[name]), (column, [row[place] for row in rows])
    assert Counter(zip(*found.values(), strict=True)) == Counter(zip(*expected.values(), strict=True))


def one_nan(bits: tuple[str, tuple[int, ...], bytes]) -> tuple[str, tuple[int, ...], bytes]:
    dtype, shape, row = bits
    if not dtype.startswith("float"):
        return bits
    values = np.frombuffer(row, dtype).copy()
    values[np.isnan(values)] = np.nan
    return dtype, shape, values.tobytes()
