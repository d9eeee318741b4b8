"""When two DataFrames count as the same, so that the rows of an earlier fit are used again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from hvdspark.data.fingerprint import fingerprint
from hvdspark.data.materialize import dataset_key
from hvdspark.data.partitions import Split
from hvdspark.plan import ColumnSpec

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
