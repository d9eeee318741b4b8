"""When two DataFrames count as the same, so that the rows of an earlier fit are used again."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hvdspark.estimators.sources import FrameSource
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from hvdspark import Store
from hvdspark.data.fingerprint import fingerprint
from hvdspark.data.materialize import dataset_key
from hvdspark.data.partitions import Split
from hvdspark.data.planning import FitDraft
from hvdspark.data.reader import ShardReader
from hvdspark.data.shards import reads_of
from hvdspark.plan import BatchSpec, ColumnSpec, FitPlan, TensorSpec

ID = ColumnSpec("id", "scalar", "int64")


@pytest.fixture
def folder(spark: SparkSession, tmp_path: Path) -> str:
    path = str(tmp_path / "rows")
    write(spark, path, 10)
    return path


def write(spark: SparkSession, path: str, rows: int) -> None:
    spark.range(rows).selectExpr("id", "id * 2 AS x").coalesce(1).write.mode("overwrite").parquet(path)


QUERIES: dict[str, Callable[[SparkSession, str], DataFrame]] = {
    "files": lambda spark, path: spark.read.parquet(path),
    "filter": lambda spark, path: spark.read.parquet(path).where("x > 3").select("id"),
    "sql": lambda spark, path: spark.sql(f"SELECT id, sum(x) AS s FROM parquet.`{path}` GROUP BY id ORDER BY id"),
    "join": lambda spark, path: spark.read.parquet(path).join(spark.range(5), "id"),
    "wide": lambda spark, path: spark.read.parquet(path).selectExpr(*[f"x + {i} AS x{i}" for i in range(60)]),
    "seeded": lambda spark, path: spark.read.parquet(path).withColumn("r", F.rand(7)).sample(fraction=0.5, seed=3),
    "values": lambda spark, path: spark.sql("SELECT * FROM VALUES (1, 'a'), (2, 'b') AS t(id, s)"),
    "higher order": lambda spark, path: spark.read.parquet(path).selectExpr("transform(array(x), v -> v + 1) AS a"),
}


@pytest.mark.parametrize("name", QUERIES)
def test_the_same_query_made_twice_is_the_same(spark: SparkSession, folder: str, name: str) -> None:
    first, second = (fingerprint(QUERIES[name](spark, folder)) for _ in range(2))
    assert first is not None
    assert first == second


@pytest.mark.parametrize("name", QUERIES)
def test_every_query_has_a_fingerprint_of_its_own(spark: SparkSession, folder: str, name: str) -> None:
    found = {key: fingerprint(make(spark, folder)) for key, make in QUERIES.items()}
    assert list(found.values()).count(found[name]) == 1


def test_a_query_is_the_same_in_another_session(spark: SparkSession, folder: str) -> None:
    other = spark.newSession()
    assert fingerprint(spark.read.parquet(folder)) == fingerprint(other.read.parquet(folder))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("x > 3", "x > 4"),
        ("x IN (1, 2)", "x IN (1, 3)"),
        ("x60 IS NULL OR x > 1", "x60 IS NULL OR x > 2"),
        (f"x IN ({', '.join(map(str, range(100)))})", f"x IN ({', '.join(map(str, [*range(99), 7]))})"),
    ],
)
def test_a_difference_anywhere_in_a_query_tells(spark: SparkSession, folder: str, first: str, second: str) -> None:
    df = spark.read.parquet(folder).selectExpr("*", *[f"x + {i} AS x{i}" for i in range(61)])
    assert fingerprint(df.where(first)) != fingerprint(df.where(second))


def test_the_values_of_a_local_table_tell(spark: SparkSession) -> None:
    first, second = (spark.sql(f"SELECT * FROM VALUES (1, 'a'), (2, '{s}') AS t(id, s)") for s in "bc")
    assert fingerprint(first) != fingerprint(second)


def test_a_source_that_is_overwritten_is_noticed_also_through_a_dataframe_made_before(
    spark: SparkSession, folder: str
) -> None:
    df = spark.read.parquet(folder)
    before = fingerprint(df)
    assert fingerprint(df) == before
    write(spark, folder, 11)
    assert fingerprint(df) != before
    assert fingerprint(spark.read.parquet(folder)) not in (None, before)


def test_a_file_that_is_replaced_by_one_of_the_same_name_and_size_is_noticed(spark: SparkSession, folder: str) -> None:
    before = fingerprint(spark.read.parquet(folder))
    file = next(Path(folder).glob("*.parquet"))
    os.utime(file, (0, 1_000_000))
    assert fingerprint(spark.read.parquet(folder)) != before


def test_a_file_that_was_only_read_is_the_same(spark: SparkSession, folder: str) -> None:
    before = fingerprint(spark.read.parquet(folder))
    for file in Path(folder).glob("*.parquet"):
        os.utime(file, (0, file.stat().st_mtime))
    assert fingerprint(spark.read.parquet(folder)) == before


def test_options_of_a_reader_tell(spark: SparkSession, tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("1,2\n3,4\n")
    first, second = (spark.read.csv(str(tmp_path / "rows.csv"), header=header) for header in (True, False))
    assert fingerprint(first) != fingerprint(second)


def session_with(spark: SparkSession, **settings: str) -> SparkSession:
    other = spark.newSession()
    for name, value in settings.items():
        other.conf.set(f"spark.sql.{name.replace('__', '.')}", value)
    return other


def split(df: DataFrame) -> list[DataFrame]:
    return df.randomSplit([0.8, 0.2], 42)


def ids_of(df: DataFrame) -> set[int]:
    return {row["id"] for row in df.select("id").collect()}


ONE_PARTITION = {"files__minPartitionNum": "1", "files__openCostInBytes": "1"}

# Rows that depend on how those before them are shared out, and rows that do not.
SHARED_OUT: dict[str, Callable[[DataFrame], DataFrame]] = {
    "random split": lambda df: split(df)[0],
    "sample": lambda df: df.sample(0.5, 3).where("x > 4"),
    "random numbers": lambda df: df.where(F.rand(7) < 0.5),
    "partition": lambda df: df.withColumn("p", F.spark_partition_id()),
    "limit": lambda df: df.limit(5),
    "one of several": lambda df: df.dropDuplicates(["x"]),
    "first of a group": lambda df: df.groupBy("x").agg(F.first("id")),
    "code": lambda df: df.mapInArrow(lambda batches: batches, "id long, x long"),
}
BY_ROW: dict[str, Callable[[DataFrame], DataFrame]] = {
    "files": lambda df: df,
    "filter and join": lambda df: df.where("x > 3").join(df.sparkSession.range(5), "id").repartition(3).sort("id"),
}


@pytest.mark.parametrize(
    "setting",
    [
        {"files__maxPartitionBytes": "4000"},
        {"files__minPartitionNum": "7"},
        {"shuffle__partitions": "7"},
        {"adaptive__enabled": "false"},
        {"leafNodeDefaultParallelism": "7"},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_that_share_rows_out_tell_where_the_rows_depend_on_that(
    spark: SparkSession, folder: str, setting: dict[str, str]
) -> None:
    first, second = (session.read.parquet(folder) for session in (spark, session_with(spark, **setting)))
    for name, query in SHARED_OUT.items():
        assert fingerprint(query(first)) != fingerprint(query(second)), name
    for name, query in BY_ROW.items():
        assert fingerprint(query(first)) == fingerprint(query(second)), name


@pytest.mark.parametrize(
    "setting",
    [
        {"session__timeZone": "America/New_York"},
        {"ansi__enabled": "false"},
        {"files__ignoreCorruptFiles": "true"},
        {"legacy__timeParserPolicy": "LEGACY"},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_that_change_values_tell_in_every_query(
    spark: SparkSession, folder: str, setting: dict[str, str]
) -> None:
    other = session_with(spark, **setting)
    for name, query in BY_ROW.items():
        first, second = (query(session.read.parquet(folder)) for session in (spark, other))
        assert fingerprint(first) != fingerprint(second), name


def test_settings_that_change_no_row_do_not_tell(spark: SparkSession, folder: str) -> None:
    other = session_with(spark, session__timeZone="UTC", ansi__enabled="true", catalog__x__token="new")
    for query in (*BY_ROW.values(), SHARED_OUT["random split"]):
        assert fingerprint(query(spark.read.parquet(folder))) == fingerprint(query(other.read.parquet(folder)))


def test_moments_of_a_text_file_in_another_zone_are_other_rows(spark: SparkSession, tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("2024-03-04 05:06:07\n")
    sessions = [session_with(spark, session__timeZone=zone) for zone in ("UTC", "Asia/Tokyo")]
    frames = [session.read.schema("t timestamp").csv(str(file)) for session in sessions]
    first, second = (df.selectExpr("unix_micros(t)").first() for df in frames)
    assert first != second
    assert fingerprint(frames[0]) != fingerprint(frames[1])


def fit_rows(df: DataFrame, store: Store) -> set[int]:
    """Give the ids that a fit of the DataFrame trains on, those of an earlier one where it takes them for the same."""
    batch = BatchSpec((TensorSpec(("id",)),), ())
    draft = FitDraft("run", store.ref(), (ID,), batch, Split(), 1, 10, 10, 1, False, 0)
    with FrameSource(df, store, keep=True).provided(draft, lambda: None) as work_for:
        plan = work_for(1)
        assert isinstance(plan, FitPlan)
        with ShardReader(store, plan.dataset, plan.columns, reads_of(plan.train, 0)) as reader:
            return {int(value) for blocks in reader for value in np.asarray(blocks["id"]).ravel()}


def test_rows_split_off_with_other_partitions_never_meet_those_kept_of_an_earlier_fit(
    spark: SparkSession, tmp_path: Path, store: Store
) -> None:
    path = str(tmp_path / "rows")
    spark.range(3000).repartition(2).write.parquet(path)
    train, test = split(spark.read.parquet(path))
    assert fit_rows(train, store) == ids_of(train)

    later_train, later_test = split(session_with(spark, **ONE_PARTITION).read.parquet(path))
    assert ids_of(train) & ids_of(later_test), "the split does not depend on the partitions: this tests nothing"
    assert not fit_rows(later_train, store) & ids_of(later_test)

    # The same partitions again: the rows that were kept, and nothing is written.
    written = store.sizes("datasets")
    again_train, again_test = split(spark.newSession().read.parquet(path))
    assert fit_rows(again_train, store) == ids_of(train)
    assert ids_of(again_test) == ids_of(test)
    assert store.sizes("datasets") == written


def test_the_same_split_on_more_cores_is_another(spark: SparkSession, folder: str) -> None:
    script = f"""
import sys
from pyspark.sql import SparkSession
from hvdspark.data.fingerprint import fingerprint
builder = SparkSession.builder.master("local[3]").config("spark.ui.enabled", "false")
for name, value in {{"shuffle.partitions": "2", "session.timeZone": "UTC"}}.items():
    builder = builder.config("spark.sql." + name, value)
df = builder.getOrCreate().read.parquet({folder!r})
print(fingerprint(df), fingerprint(df.randomSplit([0.8, 0.2], 42)[0]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    rows, train = done.stdout.split()
    df = spark.read.parquet(folder)
    assert rows == fingerprint(df)
    assert train != fingerprint(split(df)[0])


def udf(spark: SparkSession) -> DataFrame:
    return spark.range(10).where(F.udf(lambda value: value > 3, "boolean")("id"))


def rows_of_the_driver(spark: SparkSession) -> DataFrame:
    return spark.createDataFrame([(1, 2.0), (2, 3.0)], "id long, x double")


def rows_of_pandas(spark: SparkSession) -> DataFrame:
    import pandas as pd

    return spark.createDataFrame(pd.DataFrame({"id": [1, 2]}))


def arrow_function(spark: SparkSession) -> DataFrame:
    return spark.range(10).mapInArrow(lambda batches: batches, "id long")


@pytest.mark.parametrize("make", [udf, rows_of_the_driver, rows_of_pandas, arrow_function])
def test_where_a_query_holds_code_or_rows_only_the_same_object_is_the_same(
    spark: SparkSession, make: Callable[[SparkSession], DataFrame]
) -> None:
    first, second = make(spark), make(spark)
    assert fingerprint(first) is not None
    assert fingerprint(first) == fingerprint(first)
    assert fingerprint(first) != fingerprint(second)


def test_a_source_behind_code_is_still_looked_at(spark: SparkSession, folder: str) -> None:
    df = spark.read.parquet(folder).mapInArrow(lambda batches: batches, "id long, x long")
    before = fingerprint(df)
    assert before is not None
    write(spark, folder, 11)
    assert fingerprint(df) != before


@pytest.mark.parametrize(
    "make",
    [
        lambda spark, path: spark.read.parquet(path).withColumn("d", F.current_date()),
        lambda spark, path: spark.read.parquet(path).where("id = (SELECT 1 + 1 FROM range(1))"),
        lambda spark, path: spark.read.parquet(path).rdd.map(lambda row: (row[0],)).toDF(["id"]),
        lambda spark, path: spark.sparkContext.textFile(path).map(lambda line: (line,)).toDF(["s"]),
        lambda spark, path: spark.readStream.format("rate").load(),
    ],
    ids=["date", "subquery", "rdd of files", "text files", "stream"],
)
def test_where_nobody_can_tell_there_is_no_fingerprint(
    spark: SparkSession, folder: str, make: Callable[[SparkSession, str], DataFrame]
) -> None:
    if make.__code__.co_names[0] == "sparkContext":
        Path(folder, "lines").write_text("a\n")
        folder = str(Path(folder, "lines"))
    assert fingerprint(make(spark, folder)) is None


def test_rows_columns_types_split_and_seed_make_different_datasets() -> None:
    x = ColumnSpec("x", "scalar", "int64")
    keys = [
        dataset_key("rows", [ID], Split()),
        dataset_key("others", [ID], Split()),
        dataset_key("rows", [ID, x], Split()),
        dataset_key("rows", [ID, ColumnSpec("x", "scalar", "int32")], Split()),
        dataset_key("rows", [ID], Split(fraction=0.1)),
        dataset_key("rows", [ID], Split(fraction=0.1, seed=1)),
        dataset_key("rows", [ID], Split(column="x")),
    ]
    assert len(set(keys)) == len(keys)
    assert dataset_key("rows", [ID], Split()) == keys[0]
