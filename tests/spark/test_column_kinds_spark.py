"""Columns of every kind as real Spark gives them, and as the ranks read them."""

from __future__ import annotations

import tempfile
from collections import Counter
from typing import Any

from column_kinds import plan_of, rows_of, schema_of, wide_rows
from hypothesis import HealthCheck, Phase, given, settings
from pyspark.sql import SparkSession

from hvdspark import Store
from hvdspark.data.materialize import materialize
from hvdspark.data.partitions import TRAIN, Split
from hvdspark.data.reader import ShardReader
from hvdspark.data.shards import plan_shards, reads_of


# A job takes seconds whatever its rows: few examples of many columns, and no search for a smaller one that fails.
@settings(max_examples=3, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
@given(table=wide_rows())
def test_every_value_of_every_kind_comes_out_of_spark_as_it_went_in(spark: SparkSession, table: Any) -> None:
    columns, rows = table
    specs, _ = plan_of(columns)
    df = spark.createDataFrame(spark.sparkContext.parallelize(rows, 2), schema_of(columns))
    found: Counter[Any] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        store = Store.create(folder)
        dataset, manifest = materialize(df, specs, Split(), store)
        plan = plan_shards(manifest.splits[TRAIN], 1, 4, keep_order=True)
        with ShardReader(store, dataset, manifest.columns, reads_of(plan, 0)) as reader:
            for blocks in reader:
                found.update(zip(*[rows_of(blocks[name]) for name in columns], strict=True))
    assert found == Counter(
        tuple(column.row(value) for column, value in zip(columns.values(), row, strict=True)) for row in rows
    )
