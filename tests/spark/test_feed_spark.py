"""How Spark deals a DataFrame's rows to the ranks' tasks."""

from __future__ import annotations

from collections import defaultdict

import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from hvdspark.data.feed import fed_stage
from hvdspark.data.partitions import Split
from hvdspark.data.planning import FitDraft
from hvdspark.plan import BatchSpec, ColumnSpec, StoreRef, TensorSpec

COLUMNS = (ColumnSpec("id", "scalar", "int64"),)


def draft(size: int, split: Split | None = None) -> FitDraft:
    batch = BatchSpec((TensorSpec(("id",)),), (TensorSpec(("id",)),))
    return FitDraft("run", StoreRef("store"), COLUMNS, batch, split or Split(), size, 4, 4, 1, True, 0)


def shares_of(df: DataFrame, size: int, split: Split | None = None) -> list[list[int]]:
    """The rows of each task, in the order in which it is given them."""
    found: dict[int, list[int]] = defaultdict(list)
    frame = fed_stage(df, draft(size, split)).frame
    assert frame.rdd.getNumPartitions() == size
    for row in frame.select("c0", F.spark_partition_id().alias("task")).collect():
        found[row["task"]].append(row["c0"])
    return [found[task] for task in range(size)]


@pytest.mark.parametrize(("size", "partitions"), [(1, 3), (2, 1), (2, 5), (3, 4), (7, 3)])
def test_every_row_goes_to_one_task_in_the_order_of_the_data(spark: SparkSession, size: int, partitions: int) -> None:
    df = spark.range(1000, numPartitions=partitions).where("id < 300 OR id >= 650")
    shares = shares_of(df, size)
    assert sorted(row for share in shares for row in share) == [*range(300), *range(650, 1000)]
    assert all(share == sorted(share) for share in shares)
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= partitions
    assert shares == shares_of(df, size)


def test_rows_that_follow_each_other_go_to_as_many_tasks(spark: SparkSession) -> None:
    rounds = zip(*shares_of(spark.range(1000, numPartitions=1), 4), strict=True)
    assert [sorted(rows) for rows in rounds] == [list(range(first, first + 4)) for first in range(0, 1000, 4)]


def test_data_of_a_period_are_not_sorted_by_task(spark: SparkSession) -> None:
    for share in shares_of(spark.range(1000, numPartitions=2), 2):
        assert 0.4 < sum(row % 2 for row in share) / len(share) < 0.6


def test_with_rows_held_out_the_order_is_the_same(spark: SparkSession) -> None:
    df = spark.range(1000, numPartitions=3)
    assert shares_of(df, 2, Split(fraction=0.3)) == shares_of(df, 2)
