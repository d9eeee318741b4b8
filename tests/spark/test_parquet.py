"""Parquet that Spark wrote, as it is surveyed and read where it lies."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hvdspark.estimators.sources import ParquetSource
from pyspark.ml.linalg import Vectors
from pyspark.sql import SparkSession
from pyspark.sql import functions as F

from hvdspark import Store
from hvdspark.data.cells import TextBlock
from hvdspark.data.columns import column_spec, spark_schema
from hvdspark.data.materialize import materialize
from hvdspark.data.parquet import survey
from hvdspark.data.partitions import Split
from hvdspark.data.planning import FitDraft
from hvdspark.data.reader import ShardReader
from hvdspark.data.shards import plan_shards, reads_of
from hvdspark.errors import (
    CorruptDatasetError,
    EmptyDatasetError,
    NullValueError,
    ParamError,
    RaggedArrayError,
    SchemaError,
    StoreError,
)
from hvdspark.plan import BatchSpec, ColumnSpec, FitPlan, RowGroup, StoreRef, TensorSpec

EPOCH = datetime.datetime(1970, 1, 1)
MICROSECOND = datetime.timedelta(microseconds=1)


def read(store: Store, columns: Any, groups: tuple[RowGroup, ...]) -> dict[str, np.ndarray]:
    reads = reads_of(plan_shards(groups, 1, 10, keep_order=True), 0)
    with ShardReader(store, "", columns, reads) as reader:
        found = list(reader)
    return {name: np.concatenate([np.asarray(blocks[name]) for blocks in found]) for name in found[0]}


def plan_of(source: ParquetSource, columns: tuple[ColumnSpec, ...]) -> FitPlan:
    batch = BatchSpec(tuple(TensorSpec((column.name,)) for column in columns), ())
    draft = FitDraft("run", StoreRef("unused"), columns, batch, Split(), 1, 10, 10, 1, False, 0)
    with source.provided(draft, lambda: None) as work_for:
        work = work_for(1)
        assert isinstance(work, FitPlan)
        return work


def test_files_of_spark_are_read_value_by_value(spark: SparkSession, tmp_path: Path) -> None:
    path = str(tmp_path / "rows")
    first = datetime.datetime(1899, 12, 31, 23, 59, 59, 999999)
    rows = [
        (i, i / 3, i % 2 == 0, [float(i), -1.5], [[i, 1], [2, 3]], first + i * datetime.timedelta(days=9000))
        for i in range(50)
    ]
    df = spark.createDataFrame(
        rows, "i long, d double, b boolean, a array<double>, n array<array<int>>, t timestamp_ntz"
    ).coalesce(1)
    vectors = F.udf(lambda i: Vectors.dense([i, 2.0]) if i % 2 else Vectors.sparse(2, [1], [2.0]), vector_type())
    df = df.withColumn("v", vectors("i")).withColumn("day", F.to_date("t"))
    df.write.parquet(path)
    columns = [column_spec(df.schema, name) for name in df.columns]
    found = survey(path, columns)
    assert {spec.name: spec.row_shape for spec in found.columns} == {
        **dict.fromkeys("idbt", (1,)),
        "day": (1,),
        "a": (2,),
        "n": (2, 2),
        "v": (2,),
    }
    values = read(found.store, found.columns, found.groups)
    for name, dtype in (("i", "int64"), ("d", "float64"), ("b", "bool"), ("a", "float64"), ("n", "int32")):
        expected = np.array([row[df.columns.index(name)] for row in rows], dtype).reshape(values[name].shape)
        np.testing.assert_array_equal(values[name], expected)
        assert values[name].dtype == dtype
    moments = [(row[5] - EPOCH) // MICROSECOND for row in rows]
    np.testing.assert_array_equal(values["t"][:, 0], moments)
    days = [(row[5].date() - EPOCH.date()).days for row in rows]
    np.testing.assert_array_equal(values["day"][:, 0], days)
    np.testing.assert_array_equal(values["v"], [[i if i % 2 else 0, 2] for i in range(50)])


def vector_type() -> Any:
    from pyspark.ml.linalg import VectorUDT

    return VectorUDT()


def test_timestamps_in_the_old_format_of_spark_are_exact_beyond_what_nanoseconds_count(
    spark: SparkSession, tmp_path: Path
) -> None:
    path = str(tmp_path / "rows")
    spark.conf.set("spark.sql.parquet.outputTimestampType", "INT96")
    try:
        spark.sql("SELECT TIMESTAMP '3024-05-06 07:08:09.123456' AS t").write.parquet(path)
    finally:
        spark.conf.unset("spark.sql.parquet.outputTimestampType")
    found = survey(path, [column_spec(spark.read.parquet(path).schema, "t")])
    expected = (datetime.datetime(3024, 5, 6, 7, 8, 9, 123456) - EPOCH) // MICROSECOND
    assert read(found.store, found.columns, found.groups)["t"].tolist() == [[expected]]


ID = ColumnSpec("id", "scalar", "int64")


def test_every_row_of_all_files_is_there_once(spark: SparkSession, tmp_path: Path) -> None:
    path = str(tmp_path / "rows")
    spark.range(0, 1000, numPartitions=7).where("id < 100 OR id > 600").write.parquet(path)
    (tmp_path / "rows" / "_temporary.parquet").write_text("no Parquet")
    (tmp_path / "rows" / "notes.txt").write_text("no Parquet")
    found = survey(path, [ID])
    assert sorted(read(found.store, found.columns, found.groups)["id"][:, 0]) == [*range(100), *range(601, 1000)]


def test_one_file_is_enough(spark: SparkSession, tmp_path: Path) -> None:
    spark.range(10).coalesce(1).write.parquet(str(tmp_path / "rows"))
    (file,) = (tmp_path / "rows").glob("*.parquet")
    found = survey(str(file), [ID])
    assert [group.path for group in found.groups] == [file.name]
    assert sorted(read(found.store, found.columns, found.groups)["id"][:, 0]) == list(range(10))


def test_training_and_validation_files_in_different_folders_make_one_dataset(
    spark: SparkSession, tmp_path: Path
) -> None:
    paths = [str(tmp_path / "a" / "train"), str(tmp_path / "val")]
    for path, rows in zip(paths, (30, 4), strict=True):
        spark.range(rows).write.parquet(path)
    plan = plan_of(ParquetSource(spark, *paths), (ID,))
    assert plan.data is not None
    assert plan.val is not None
    for shards, rows in ((plan.train, 30), (plan.val, 4)):
        values = read(Store.from_ref(plan.data), plan.columns, shards.groups)
        assert sorted(values["id"][:, 0]) == list(range(rows))


def test_a_dataset_that_a_fit_wrote_is_taken_with_its_split(spark: SparkSession, store: Store) -> None:
    df = spark.range(100).selectExpr("id", "id % 2 = 1 AS held", "array(float(id), 2f) AS a")
    columns = tuple(column_spec(df.schema, name) for name in ("id", "a"))
    folder, manifest = materialize(df, columns, Split(column="held"), store)
    source = ParquetSource(spark, store.url_of(folder), None)
    assert source.schema == spark_schema(manifest.columns)
    source.check(0.1)
    plan = plan_of(source, columns)
    assert plan.data is not None
    assert plan.val is not None
    assert (plan.train.rows, plan.columns) == (50, manifest.columns)
    values = read(Store.from_ref(plan.data), plan.columns, plan.val.groups)
    np.testing.assert_array_equal(values["a"][:, 0], values["id"][:, 0])
    assert sorted(values["id"][:, 0]) == list(range(1, 100, 2))


def test_a_dataset_that_lost_a_file_is_refused_by_its_name(spark: SparkSession, store: Store) -> None:
    folder, manifest = materialize(spark.range(10, numPartitions=1), [ID], Split(), store)
    file = Path(store.path(folder, manifest.splits["train"][0].path))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CorruptDatasetError, match=rf"{file} has \d+ bytes, but \d+ were written"):
        ParquetSource(spark, store.url_of(folder), None)
    file.unlink()
    with pytest.raises(CorruptDatasetError, match=rf"{file} is missing"):
        ParquetSource(spark, store.url_of(folder), None)


def test_a_file_that_is_no_parquet_is_refused_by_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(CorruptDatasetError, match=str(tmp_path / "a.parquet")):
        survey(str(tmp_path), [ID])


def test_what_cannot_be_trained_on_is_refused_with_what_to_do(spark: SparkSession, tmp_path: Path) -> None:
    path = str(tmp_path / "rows")
    with pytest.raises(StoreError, match="no Parquet file or folder at"):
        survey(path, [ID])
    spark.range(10).selectExpr("IF(id < 3, NULL, id) AS id", "id % 2 AS p").write.partitionBy("p").parquet(path)
    with pytest.raises(StoreError, match="partitioned into folders"):
        survey(path, [ID])
    spark.read.parquet(path).drop("p").write.parquet(f"{path}2")
    with pytest.raises(NullValueError, match="column 'id' has 3 nulls"):
        survey(f"{path}2", [ID])
    spark.range(0).write.parquet(f"{path}3")
    with pytest.raises(EmptyDatasetError, match="no rows"):
        survey(f"{path}3", [ID])
    spark.range(1, 9).selectExpr("sequence(1, id) AS a").coalesce(1).write.parquet(f"{path}4")
    with pytest.raises(RaggedArrayError, match="column 'a'"):
        survey(f"{path}4", [ColumnSpec("a", "array", "int64", size=None)])


def test_rows_are_never_held_out_of_files(spark: SparkSession, tmp_path: Path, store: Store) -> None:
    path = str(tmp_path / "rows")
    spark.range(10).write.parquet(path)
    with pytest.raises(ParamError, match=r"validation=0\.1: fit_on_parquet"):
        ParquetSource(spark, path, None).check(0.1)
    ParquetSource(spark, path, path).check(0.1)
    folder, _ = materialize(spark.range(10), [ID], Split(), store)
    with pytest.raises(ParamError, match="leave out validation_path"):
        ParquetSource(spark, store.url_of(folder), path).check(None)
    with pytest.raises(SchemaError, match="'idd' does not exist"):
        column_spec(ParquetSource(spark, store.url_of(folder), None).schema, "idd")


def test_arrays_texts_and_numbers_in_the_types_of_other_programs_are_read_as_spark_sees_them(
    spark: SparkSession, tmp_path: Path
) -> None:
    rows = [[1, 2], [3, 4]]
    columns: dict[str, tuple[pa.Array, Any]] = {
        "wide_list": (pa.array(rows, pa.large_list(pa.float32())), rows),
        "fixed_list": (pa.array(rows, pa.list_(pa.int64(), 2)), rows),
        "nested": (pa.array([rows, rows], pa.large_list(pa.list_(pa.int16(), 2))), [rows, rows]),
        "unsigned_list": (pa.array(rows, pa.large_list(pa.uint8())), rows),
        "u8": (pa.array([1, 255], pa.uint8()), [[1], [255]]),
        "u16": (pa.array([1, 65535], pa.uint16()), [[1], [65535]]),
        "u32": (pa.array([1, 2**32 - 1], pa.uint32()), [[1], [2**32 - 1]]),
        "shares": (pa.array([1.5, -2.5]).dictionary_encode(), [[1.5], [-2.5]]),
        "span": (pa.array([5, 7], pa.duration("ns")), [[5], [7]]),
        "seconds": (pa.array([1, 2], pa.timestamp("s", "Europe/Berlin")), [[10**6], [2 * 10**6]]),
        "day": (pa.array([86_400_000, 0], pa.date64()), [[1], [0]]),
        "cells": (pa.array([b"ab", b"cd"], pa.binary(2)), [[97, 98], [99, 100]]),
        "text": (pa.array(["a", "ö"], pa.string_view()), ["a", "ö"]),
        "category": (pa.array(["a", "ö"]).dictionary_encode(), ["a", "ö"]),
    }
    pq.write_table(pa.table({name: column for name, (column, _) in columns.items()}), tmp_path / "a.parquet")
    source = ParquetSource(spark, str(tmp_path), None)
    found = survey(str(tmp_path), [column_spec(source.schema, name) for name in columns])
    reads = reads_of(plan_shards(found.groups, 1, 10, keep_order=True), 0)
    with ShardReader(found.store, "", found.columns, reads) as reader:
        (blocks,) = reader
    for name, (_, expected) in columns.items():
        block = blocks[name]
        values = [cell.as_py().decode() for cell in block.cells] if isinstance(block, TextBlock) else block.tolist()
        assert values == expected, name


@pytest.mark.parametrize(
    ("column", "named"),
    [
        (pa.array([1, 2], pa.timestamp("ns")), "timestamp\\[ns\\]"),
        (pa.array(np.zeros(2, "float16")), "halffloat"),
        (pa.array([[1], [2]], pa.list_(pa.float16())), "list<element: halffloat>"),
        (pa.array([1, 2], pa.time64("us")), "time64\\[us\\]"),
    ],
    ids=["nanoseconds", "half", "half in lists", "time of day"],
)
def test_a_type_that_spark_does_not_read_is_refused_with_its_column_and_what_to_do(
    spark: SparkSession, tmp_path: Path, column: pa.Array, named: str
) -> None:
    pq.write_table(pa.table({"id": [1, 2], "c": column}), tmp_path / "a.parquet")
    with pytest.raises(SchemaError, match=rf"column 'c' of {tmp_path} has the type {named}, which Spark.*microseconds"):
        ParquetSource(spark, str(tmp_path), None)


def test_numbers_that_spark_takes_for_decimals_are_refused_with_what_to_do(spark: SparkSession, tmp_path: Path) -> None:
    pq.write_table(pa.table({"c": pa.array([1], pa.uint64())}), tmp_path / "a.parquet")
    with pytest.raises(SchemaError, match=r"column 'c' has type decimal\(20,0\).*cast it to double"):
        column_spec(ParquetSource(spark, str(tmp_path), None).schema, "c")
