"""DataFrames to datasets through real Spark tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from pyspark.errors import PythonException
from pyspark.ml.linalg import SparseVector, Vectors
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from hvdspark import Store
from hvdspark.data.columns import column_spec
from hvdspark.data.materialize import DATASETS, load_manifest, materialize
from hvdspark.data.partitions import TRAIN, VAL, Split
from hvdspark.data.reader import ShardReader
from hvdspark.data.shards import plan_shards, reads_of
from hvdspark.errors import EmptyDatasetError, NullValueError, RaggedArrayError
from hvdspark.plan import ColumnSpec

Blocks = dict[str, npt.NDArray[Any]]
ID = ColumnSpec("id", "scalar", "int64")


def specs_of(df: DataFrame) -> list[ColumnSpec]:
    return [column_spec(df.schema, name) for name in df.columns]


def read(store: Store, dataset: str, split: str = TRAIN) -> Blocks:
    """Read a split through one thread, in its order."""
    manifest = load_manifest(store, dataset)
    plan = plan_shards(manifest.splits[split], 1, 5, keep_order=True)
    with ShardReader(store, dataset, manifest.columns, reads_of(plan, 0), workers=1) as reader:
        found = list(reader)
    return {spec.name: np.concatenate([item[spec.name] for item in found]) for spec in manifest.columns}


def written(df: DataFrame, store: Store, split: Split | None = None) -> Blocks:
    dataset, _ = materialize(df, specs_of(df), split or Split(), store)
    return read(store, dataset)


def files_in(store: Store) -> list[Path]:
    return [path for path in Path(store.url).rglob("*") if path.is_file()]


@pytest.mark.parametrize("partitions", [1, 3, 40])
def test_every_row_is_stored_once_in_the_order_of_the_partitions(
    spark: SparkSession, store: Store, partitions: int
) -> None:
    df = spark.range(0, 100, numPartitions=partitions).select("id", (F.col("id") / 8).alias("eighth"))
    found = written(df, store)
    assert found["id"].ravel().tolist() == list(range(100))
    assert found["eighth"].ravel().tolist() == [number / 8 for number in range(100)]


def test_partitions_without_rows_are_no_trouble(spark: SparkSession, store: Store) -> None:
    df = spark.range(0, 90, numPartitions=9).where("id % 30 = 7")
    dataset, manifest = materialize(df, [ID], Split(), store)
    assert read(store, dataset)["id"].ravel().tolist() == [7, 37, 67]
    assert len(manifest.splits[TRAIN]) == 3


def test_one_row_is_enough(spark: SparkSession, store: Store) -> None:
    assert written(spark.range(1), store)["id"].tolist() == [[0]]


@pytest.mark.parametrize("partitions", [1, 5])
def test_no_rows_are_refused_and_nothing_stays_in_the_store(spark: SparkSession, store: Store, partitions: int) -> None:
    df = spark.range(0, 10, numPartitions=partitions).where("id < 0")
    with pytest.raises(EmptyDatasetError, match=r"the DataFrame is empty.*filters and joins"):
        materialize(df, [ID], Split(), store)
    assert store.list(DATASETS) == []


def test_a_dataframe_without_partitions_is_empty_too(spark: SparkSession, store: Store) -> None:
    df = spark.createDataFrame([], "id long")
    with pytest.raises(EmptyDatasetError, match=r"the DataFrame is empty"):
        materialize(df, [ID], Split(), store)


def test_every_type_of_number_is_stored_as_it_is(spark: SparkSession, store: Store) -> None:
    schema = "b boolean, t tinyint, s smallint, i int, l bigint, f float, d double"
    rows = [
        (True, -128, -32768, -(2**31), -(2**63), float("-inf"), float("nan")),
        (False, 127, 32767, 2**31 - 1, 2**63 - 1, 1.5, -0.0),
    ]
    found = written(spark.createDataFrame(rows, schema).coalesce(1), store)
    assert [found[name].dtype.name for name in "btsilfd"] == [
        "bool",
        "int8",
        "int16",
        "int32",
        "int64",
        "float32",
        "float64",
    ]
    for index, name in enumerate("btsilfd"):
        expected = np.array([row[index] for row in rows], found[name].dtype)
        assert found[name].tobytes() == expected.tobytes()


def test_arrays_and_vectors_dense_and_sparse_are_stored_dense(spark: SparkSession, store: Store) -> None:
    rows = [
        ([1.0, 2.0], Vectors.dense([0.0, 0.5, -0.0]), [True]),
        ([3.0, 4.0], Vectors.sparse(3, [1], [7.0]), [False]),
        ([5.0, 6.0], Vectors.sparse(3, [], []), [True]),
        ([7.0, 8.0], Vectors.dense([1.0, 2.0, 3.0]), [False]),
    ]
    schema = (
        T.StructType.fromDDL("a array<double>")
        .add("v", column_type(rows[0][1]))
        .add("flags", T.ArrayType(T.BooleanType()))
    )
    df = spark.createDataFrame(rows, schema)
    dataset, manifest = materialize(df.repartitionByRange(3, F.element_at("a", 1)), specs_of(df), Split(), store)
    found = read(store, dataset)
    assert {spec.name: spec.size for spec in manifest.columns} == {"a": 2, "v": 3, "flags": 1}
    order = np.argsort(found["a"][:, 0])
    assert found["a"][order].tolist() == [row[0] for row in rows]
    assert found["v"][order].tolist() == [row[1].toArray().tolist() for row in rows]
    assert found["flags"][order].tolist() == [row[2] for row in rows]


def column_type(vector: Any) -> T.DataType:
    kind: T.DataType = vector.__UDT__
    return kind


def test_vectors_that_spark_assembles_know_their_size_and_come_back(spark: SparkSession, store: Store) -> None:
    from pyspark.ml.feature import VectorAssembler

    numbers = spark.range(0, 20, numPartitions=2).select("id", (F.col("id") % 2).alias("odd"), F.lit(0.0).alias("z"))
    df = VectorAssembler(inputCols=["odd", "z", "id"], outputCol="v").transform(numbers).select("v")
    assert any(isinstance(row["v"], SparseVector) for row in df.collect())
    assert column_spec(df.schema, "v").size == 3
    assert written(df, store)["v"].tolist() == [[number % 2, 0.0, number] for number in range(20)]


def test_nulls_are_counted_over_all_partitions(spark: SparkSession, store: Store) -> None:
    df = spark.range(0, 100, numPartitions=7).select(
        F.when(F.col("id") % 10 != 0, F.col("id")).alias("x"),
        F.when(F.col("id") != 50, F.array(F.col("id"), F.lit(1))).alias("a"),
    )
    with pytest.raises(NullValueError, match=r"column 'x' has 10 nulls \(also: a\)") as caught:
        materialize(df, specs_of(df), Split(), store)
    assert (caught.value.column, caught.value.count) == ("x", 10)
    assert store.list(DATASETS) == []


@pytest.mark.parametrize("partitions", [1, 4])
def test_ragged_arrays_are_refused_wherever_they_are(spark: SparkSession, store: Store, partitions: int) -> None:
    df = spark.range(0, 8, numPartitions=partitions).select(
        F.when(F.col("id") < 6, F.array(F.lit(1.0), F.lit(2.0))).otherwise(F.array(F.lit(1.0))).alias("a")
    )
    with pytest.raises(RaggedArrayError, match=r"'a' has rows of different lengths") as caught:
        materialize(df, specs_of(df), Split(), store)
    assert caught.value.lengths == (2, 1)
    assert store.list(DATASETS) == []


@pytest.mark.parametrize(
    "names",
    [
        ["a b", "größe", "日本", "_c0", "a/b", "select", "x-y", "A[0]", "'q'", "a,b;{}()\n\t=", "1"],
        ["a.b"],
        ["a`b"],
        ["*", "a"],
        ["a", "a.b", "a.b.c", "`a`.`b`"],
    ],
    ids=["odd", "dot", "backtick", "star", "all of it"],
)
def test_columns_may_have_any_name(spark: SparkSession, store: Store, names: list[str]) -> None:
    df = spark.range(0, 6, numPartitions=2).select(
        *[(F.col("id") + number).alias(name) for number, name in enumerate(names)]
    )
    found = written(df, store)
    for number, name in enumerate(names):
        assert found[name].ravel().tolist() == [row + number for row in range(6)]


def test_a_column_with_dots_in_its_name_is_not_a_field_of_a_struct(spark: SparkSession, store: Store) -> None:
    df = spark.range(3).select(F.struct((F.col("id") * 10).alias("b")).alias("a"), F.col("id").alias("a.b"))
    dataset, _ = materialize(df, [ColumnSpec("a.b", "scalar", "int64")], Split(), store)
    assert sorted(read(store, dataset)["a.b"].ravel().tolist()) == [0, 1, 2]


@pytest.mark.parametrize("name", ["held.out", "held out"])
def test_a_column_of_marks_splits_the_rows(spark: SparkSession, store: Store, name: str) -> None:
    df = spark.range(0, 20, numPartitions=3).select("id", (F.col("id") % 4 == 0).cast("int").alias(name))
    dataset, manifest = materialize(df, [ID], Split(column=name), store)
    assert read(store, dataset, VAL)["id"].ravel().tolist() == [0, 4, 8, 12, 16]
    assert read(store, dataset)["id"].ravel().tolist() == [number for number in range(20) if number % 4]
    assert [spec.name for spec in manifest.columns] == ["id"]


def test_a_column_of_booleans_splits_the_rows(spark: SparkSession, store: Store) -> None:
    df = spark.range(0, 20, numPartitions=3).select("id", (F.col("id") % 4 == 0).alias("v"))
    dataset, _ = materialize(df, [ID], Split(column="v"), store)
    assert read(store, dataset, VAL)["id"].ravel().tolist() == [0, 4, 8, 12, 16]


def test_the_same_seed_gives_the_same_split(spark: SparkSession, store: Store) -> None:
    df = spark.range(0, 1000, numPartitions=4)

    def held_out(seed: int) -> list[int]:
        dataset, _ = materialize(df, [ID], Split(fraction=0.3, seed=seed), store)
        assert sorted([*read(store, dataset)["id"].ravel(), *read(store, dataset, VAL)["id"].ravel()]) == list(
            range(1000)
        )
        return read(store, dataset, VAL)["id"].ravel().tolist()  # type: ignore[no-any-return]

    first = held_out(1)
    assert held_out(1) == first
    assert held_out(2) != first
    assert 200 < len(first) < 400


def breaking_at(row: int) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """Return a function that fails at a row; defined within another one, so that it travels by value."""

    def hand_on(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            if row in batch["id"].to_pylist():
                raise ZeroDivisionError(f"row {row}")
            yield batch

    return hand_on


def test_a_task_that_fails_leaves_nothing_in_the_store(spark: SparkSession, store: Store) -> None:
    df = spark.range(0, 100, numPartitions=4).mapInArrow(breaking_at(77), "id long")
    with pytest.raises(PythonException, match=r"ZeroDivisionError: row 77"):
        materialize(df, [ID], Split(fraction=0.2), store)
    assert files_in(store) == []
    assert store.list(DATASETS) == []


def test_writing_takes_one_job(spark: SparkSession, store: Store, jobs_of: Callable[[], int]) -> None:
    materialize(spark.range(0, 100, numPartitions=4), [ID], Split(fraction=0.2), store)
    assert jobs_of() == 1


def test_a_store_that_executors_cannot_write_is_an_error_that_names_the_reason(
    spark: SparkSession, tmp_path: Path
) -> None:
    (tmp_path / "store").write_text("a file in the way")
    store = Store.create(tmp_path / "store")
    with pytest.raises(PythonException, match=r"NotADirectoryError|FileExistsError"):
        materialize(spark.range(10), [ID], Split(), store)
