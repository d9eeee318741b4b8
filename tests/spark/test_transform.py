"""Scoring DataFrames: lazily, with every column kept, and with the schema that was promised."""

from __future__ import annotations

import contextlib
import datetime
import decimal
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import psutil
import pytest
from hvdspark.estimators import KerasModel
from hvdspark.estimators.keras import codec
from pyspark.errors import PythonException
from pyspark.ml.evaluation import (
    BinaryClassificationEvaluator,
    MulticlassClassificationEvaluator,
    RegressionEvaluator,
)
from pyspark.ml.feature import VectorAssembler
from pyspark.ml.functions import vector_to_array
from pyspark.ml.linalg import Vectors, VectorUDT
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F
from pyspark.sql import types as T

from hvdspark.errors import ModelFormatError, ParamError, SchemaError


def spark_model(network: keras.Model, features: Sequence[Any] = ("v",), labels: Sequence[str] = ("y",)) -> Any:
    inputs, outputs = codec.describe(network)
    assert inputs is not None
    assert outputs is not None
    model: Any = KerasModel(codec.model_to_bytes(network), inputs, outputs)
    return model.setFeatureCols(list(features)).setLabelCols(list(labels)).setTransformBatchSize(4)


def dense(*units: int, inputs: int = 2, activation: str | None = None) -> keras.Model:
    keras.utils.set_random_seed(3)
    layers = [keras.layers.Dense(unit, activation) for unit in units]
    return keras.Sequential([keras.Input((inputs,)), *layers])


@pytest.fixture(scope="module")
def rows(spark: SparkSession) -> DataFrame:
    """Twenty rows in two partitions; column ``v`` is the vector ``(a, b)``."""
    numbers = spark.range(0, 20, numPartitions=2).select(
        F.col("id").alias("a"), (F.col("id") % 3).cast("double").alias("b"), (F.col("id") % 2).alias("y")
    )
    return VectorAssembler(inputCols=["a", "b"], outputCol="v").transform(numbers)


MATRIX = np.array([[number, number % 3] for number in range(20)], "float32")


def column(df: DataFrame, name: str, by: str = "a") -> list[Any]:
    return [row[name] for row in df.select(by, name).orderBy(by).collect()]


def test_scores_are_those_of_the_model(rows: DataFrame) -> None:
    network = dense(4, 1)
    found = column(spark_model(network).transform(rows), "y__output")
    assert found == pytest.approx(np.asarray(network(MATRIX)).ravel(), rel=1e-5)


def test_transform_runs_no_job_and_one_action_runs_one(rows: DataFrame, jobs_of: Callable[[], int]) -> None:
    scored = spark_model(dense(1)).transform(rows)
    scored.schema  # noqa: B018  (reading it must not run a job either)
    assert jobs_of() == 0
    assert len(scored.select("y__output").collect()) == 20
    assert jobs_of() == 1


def test_partitions_without_rows_and_dataframes_without_rows_are_no_trouble(
    spark: SparkSession, rows: DataFrame
) -> None:
    model = spark_model(dense(1))
    some = model.transform(rows.repartition(4, "a").where("a IN (3, 17)"))
    assert column(some, "a") == [3, 17]
    none = model.transform(rows.where("a < 0"))
    assert none.collect() == []
    assert none.columns == [*rows.columns, "y__output"]


def test_every_partition_keeps_its_rows_and_their_order(rows: DataFrame) -> None:
    def by_partition(df: DataFrame) -> list[Any]:
        return [[row["a"] for row in part] for part in df.rdd.glom().collect()]

    assert by_partition(spark_model(dense(1)).transform(rows).select("a")) == by_partition(rows.select("a"))


KINDS: dict[str, tuple[T.DataType, list[Any]]] = {
    "text": (T.StringType(), ["ü", None, ""]),
    "flag": (T.BooleanType(), [True, None, False]),
    "tiny": (T.ByteType(), [-128, None, 127]),
    "whole": (T.LongType(), [-(2**63), None, 2**63 - 1]),
    "single": (T.FloatType(), [1.5, None, float("-inf")]),
    "double": (T.DoubleType(), [0.1, None, -0.0]),
    "amount": (T.DecimalType(38, 18), [decimal.Decimal("1.000000000000000001"), None, decimal.Decimal(-5)]),
    "day": (T.DateType(), [datetime.date(1, 1, 1), None, datetime.date(9999, 12, 31)]),
    "moment": (
        T.TimestampType(),
        [datetime.datetime(2020, 2, 29, 1, 2, 3, 456789), None, datetime.datetime(1960, 1, 1)],
    ),
    "local": (
        T.TimestampNTZType(),
        [datetime.datetime(2020, 2, 29, 1, 2, 3, 456789), None, datetime.datetime(1960, 1, 1)],
    ),
    "span": (T.DayTimeIntervalType(), [datetime.timedelta(days=1, microseconds=1), None, datetime.timedelta(-1)]),
    "raw": (T.BinaryType(), [bytearray(b"\x00\xff"), None, bytearray()]),
    "tags": (T.ArrayType(T.StringType()), [["a", None], None, []]),
    "grid": (T.ArrayType(T.ArrayType(T.IntegerType())), [[[1], [], None], None, []]),
    "pairs": (T.MapType(T.StringType(), T.DoubleType()), [{"k": 1.0, "n": None}, None, {}]),
    "inner": (
        T.StructType().add("a", T.LongType()).add("b", T.StructType().add("c", T.StringType())),
        [Row(a=1, b=Row(c="x")), None, Row(a=None, b=None)],
    ),
    "vector": (VectorUDT(), [Vectors.dense([1.0, 2.0]), None, Vectors.sparse(3, [1], [2.0])]),
    "nothing": (T.NullType(), [None, None, None]),
}


def test_columns_of_every_type_are_kept_with_their_nulls(spark: SparkSession) -> None:
    schema = T.StructType().add("a", T.LongType(), nullable=False).add("v", T.ArrayType(T.DoubleType()))
    for name, (data_type, _) in KINDS.items():
        schema.add(name, data_type, metadata={"comment": f"about {name}"})
    lines = [(index, [1.0, 2.0], *[values[index] for _, values in KINDS.values()]) for index in range(3)]
    df = spark.createDataFrame(lines, schema)
    scored = spark_model(dense(1)).transform(df)
    assert scored.schema.fields[:-1] == df.schema.fields
    assert scored.drop("y__output").orderBy("a").collect() == df.orderBy("a").collect()


@pytest.mark.parametrize(
    ("units", "wanted", "expected"),
    [
        (1, None, T.DoubleType()),
        (3, None, VectorUDT()),
        (1, "vector", VectorUDT()),
        (1, "array", T.ArrayType(T.FloatType(), False)),
        (3, "array", T.ArrayType(T.FloatType(), False)),
    ],
)
def test_the_schema_that_is_promised_is_the_one_that_comes(
    rows: DataFrame, units: int, wanted: str | None, expected: T.DataType
) -> None:
    network = dense(units)
    model = spark_model(network).setOutputTypes([wanted])
    promised = model.transformSchema(rows.schema)
    scored = model.transform(rows)
    assert scored.schema == promised
    assert promised["y__output"] == T.StructField("y__output", expected, nullable=False)
    found = np.array([np.ravel(getattr(value, "values", value)) for value in column(scored, "y__output")])
    assert found == pytest.approx(np.asarray(network(MATRIX)), rel=1e-5)


def test_outputs_of_several_axes_are_nested_arrays(rows: DataFrame) -> None:
    keras.utils.set_random_seed(3)
    network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(6), keras.layers.Reshape((2, 3))])
    scored = spark_model(network).transform(rows)
    assert scored.schema["y__output"].dataType == T.ArrayType(T.ArrayType(T.FloatType(), False), False)
    assert np.array(column(scored, "y__output")) == pytest.approx(np.asarray(network(MATRIX)), rel=1e-5)


def test_class_numbers_stay_whole_numbers(rows: DataFrame) -> None:
    class Largest(keras.layers.Layer):
        def call(self, inputs: Any) -> Any:
            return keras.ops.argmax(inputs, axis=-1)

    network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3), Largest()])
    model = spark_model(network).setCustomObjects({"Largest": Largest})
    scored = model.transform(rows)
    assert isinstance(scored.schema["y__output"].dataType, T.IntegerType | T.LongType)
    assert column(scored, "y__output") == np.asarray(network(MATRIX)).tolist()


def two_headed() -> keras.Model:
    keras.utils.set_random_seed(3)
    number = keras.Input((1,), name="number")
    pair = keras.Input((2,), name="pair")
    code = keras.Input((), dtype="int32", name="code")
    joined = keras.layers.Concatenate()([number, pair, keras.layers.Embedding(3, 2)(code)])
    outputs = [keras.layers.Dense(1, name="price")(joined), keras.layers.Dense(2, name="kind")(joined)]
    return keras.Model([number, pair, code], outputs)


def test_several_inputs_and_outputs_keep_their_order(rows: DataFrame) -> None:
    network = two_headed()
    model = spark_model(network, ["b", ["a", "b"], "y"], ["p", "k"])
    scored = model.transform(rows)
    assert scored.columns == [*rows.columns, "p__output", "k__output"]
    numbers = np.arange(20)
    price, kind = network([MATRIX[:, 1:], MATRIX, numbers % 2])
    assert column(scored, "p__output") == pytest.approx(np.asarray(price).ravel(), rel=1e-5)
    vectors = np.array([vector.toArray() for vector in column(scored, "k__output")])
    assert vectors == pytest.approx(np.asarray(kind), rel=1e-5)


def test_a_model_with_named_inputs_is_fed_by_their_order(rows: DataFrame) -> None:
    keras.utils.set_random_seed(3)
    inputs = {"second": keras.Input((2,), name="second"), "first": keras.Input((1,), name="first")}
    joined = keras.layers.Concatenate()([inputs["first"] * 100, inputs["second"]])
    network = keras.Model(inputs, keras.layers.Dense(1)(joined))
    sizes = {"second": ["a", "b"], "first": "b"}
    order = [tensor.name for tensor in codec.describe(network)[0] or ()]
    scored = spark_model(network, [sizes[name] for name in order]).transform(rows)
    expected = network({"first": MATRIX[:, 1:], "second": MATRIX})
    assert column(scored, "y__output") == pytest.approx(np.asarray(expected).ravel(), rel=1e-5)


def test_the_batch_size_does_not_change_the_scores(rows: DataFrame) -> None:
    network = dense(8, 1, activation="tanh")
    found = [
        column(spark_model(network).setTransformBatchSize(size).transform(rows), "y__output") for size in (1, 1000)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_scores_may_be_scored_again(rows: DataFrame) -> None:
    first, second = spark_model(dense(2)), spark_model(dense(1, activation="tanh"), ["first"])
    first.setOutputCols(["first"])
    scored = second.transform(first.transform(rows))
    assert scored.columns == [*rows.columns, "first", "y__output"]
    between = np.asarray(dense(2)(MATRIX))
    expected = np.asarray(dense(1, activation="tanh")(between)).ravel()
    assert column(scored, "y__output") == pytest.approx(expected, rel=1e-4)


def test_two_models_score_side_by_side_in_one_worker(rows: DataFrame) -> None:
    first, second = dense(1), dense(4, 1)
    for network in (first, second, first):
        found = column(spark_model(network).transform(rows), "y__output")
        assert found == pytest.approx(np.asarray(network(MATRIX)).ravel(), rel=1e-5)


def test_dropout_is_off_when_scoring(rows: DataFrame) -> None:
    keras.utils.set_random_seed(3)
    network = keras.Sequential([keras.Input((2,)), keras.layers.Dropout(0.5), keras.layers.Dense(1)])
    found = column(spark_model(network).transform(rows), "y__output")
    assert found == pytest.approx(np.asarray(network(MATRIX, training=False)).ravel(), rel=1e-5)


def test_an_output_column_that_exists_already_is_refused_before_a_job(
    rows: DataFrame, jobs_of: Callable[[], int]
) -> None:
    model = spark_model(dense(1)).setOutputCols(["b"])
    for attempt in (model.transform, lambda df: model.transformSchema(df.schema)):
        with pytest.raises(SchemaError, match=r"the output column 'b' exists already.*setOutputCols"):
            attempt(rows)
    assert jobs_of() == 0


def test_a_missing_feature_is_refused_before_a_job(rows: DataFrame, jobs_of: Callable[[], int]) -> None:
    with pytest.raises(SchemaError, match=r"column 'vv' does not exist. Did you mean 'v'"):
        spark_model(dense(1), ["vv"]).transform(rows)
    assert jobs_of() == 0


def test_a_feature_of_another_size_is_refused_before_a_job(rows: DataFrame, jobs_of: Callable[[], int]) -> None:
    with pytest.raises(SchemaError, match=r"the columns v hold 2 values per row, .* takes 3"):
        spark_model(dense(1, inputs=3)).transform(rows)
    assert jobs_of() == 0


@pytest.mark.parametrize("names", [[], ["p", "q"]])
def test_one_name_per_output_is_needed(rows: DataFrame, names: list[str]) -> None:
    with pytest.raises(ParamError, match=rf"output_cols has {len(names)} names, but the model has 1 outputs"):
        spark_model(dense(1)).setOutputCols(names).transform(rows)


def test_a_model_without_a_file_says_so(rows: DataFrame) -> None:
    model: Any = KerasModel()
    with pytest.raises(ModelFormatError, match=r"this KerasModel holds no model; make one with fit\(\) or load\(\)"):
        model.setFeatureCols(["v"]).transform(rows)


def test_a_null_feature_is_an_error_that_names_its_column(spark: SparkSession) -> None:
    df = spark.createDataFrame([(1.0, 2.0), (None, 3.0)], "a double, b double")
    with pytest.raises(PythonException, match=r"NullValueError: column 'a' has 1 nulls"):
        spark_model(dense(1), [["a", "b"]]).transform(df).collect()


def test_labels_are_not_needed_for_scoring(rows: DataFrame) -> None:
    assert "y__output" in spark_model(dense(1)).transform(rows.drop("y")).columns


@pytest.mark.parametrize("name", ["v.1", "v 1", "`v`"])
def test_columns_may_have_any_name(rows: DataFrame, name: str) -> None:
    df = rows.withColumnRenamed("v", name).withColumn("other.column", F.lit("kept"))
    network = dense(1)
    scored = spark_model(network, [name]).setOutputCols(["out.put"]).transform(df)
    assert scored.columns == [*df.columns, "out.put"]
    found = [row["out.put"] for row in sorted(scored.collect(), key=lambda row: row["a"])]
    assert found == pytest.approx(np.asarray(network(MATRIX)).ravel(), rel=1e-5)


def test_columns_of_one_name_that_are_no_features_are_kept(rows: DataFrame) -> None:
    df = rows.select("*", F.lit(1).alias("twin"), F.lit("x").alias("twin"))
    scored = spark_model(dense(1)).transform(df)
    assert scored.columns == [*df.columns, "y__output"]
    assert scored.collect()[0][-3:-1] == (1, "x")


def test_evaluators_take_the_outputs(spark: SparkSession, rows: DataFrame) -> None:
    scored = spark_model(dense(1)).transform(rows)
    regression = RegressionEvaluator(predictionCol="y__output", labelCol="y", metricName="rmse").evaluate(scored)
    found = np.asarray(dense(1)(MATRIX)).ravel()
    assert regression == pytest.approx(np.sqrt(np.mean((found - np.arange(20) % 2) ** 2)), rel=1e-5)
    raw = spark_model(dense(2, activation="softmax")).transform(rows)
    area = BinaryClassificationEvaluator(rawPredictionCol="y__output", labelCol="y").evaluate(raw)
    assert 0 <= area <= 1
    chosen = raw.withColumn(
        "pick", F.array_position(vector_to_array("y__output"), F.array_max(vector_to_array("y__output"))) - 1.0
    )
    accuracy = MulticlassClassificationEvaluator(
        predictionCol="pick", labelCol="y", probabilityCol="y__output", metricName="accuracy"
    ).evaluate(chosen)
    expected = np.argmax(np.asarray(dense(2, activation="softmax")(MATRIX)), axis=1) == np.arange(20) % 2
    assert accuracy == pytest.approx(expected.mean())


def test_a_view_of_the_scores_can_be_queried(spark: SparkSession, rows: DataFrame) -> None:
    spark_model(dense(1)).transform(rows).createOrReplaceTempView("scores")
    [row] = spark.sql("SELECT count(y__output) AS n FROM scores WHERE a >= 10").collect()
    assert row["n"] == 10


def python_workers() -> dict[int, int]:
    """Return the peak resident memory of each of Spark's Python workers of this session, in bytes."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, OSError):
            if "pyspark.daemon" in " ".join(process.cmdline()):
                status = Path(f"/proc/{process.pid}/status").read_text()
                found[process.pid] = 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])  # type: ignore[index]
    return found


def test_ten_million_rows_take_no_more_memory_than_one_million(spark: SparkSession) -> None:
    model = spark_model(dense(1)).setTransformBatchSize(8192)

    def score(rows: int) -> int:
        numbers = spark.range(0, rows, numPartitions=2).select(F.col("id").cast("float").alias("a"))
        scored = model.transform(numbers.select("a", F.array("a", -F.col("a")).alias("v")))
        return int(scored.where(F.col("y__output").isNotNull()).count())

    assert score(1_000_000) == 1_000_000
    before = python_workers()
    assert score(10_000_000) == 10_000_000
    after = python_workers()
    # The same workers served both, so that what grows with the rows shows.
    compared = {pid: after[pid] - before[pid] for pid in before.keys() & after.keys()}
    assert len(compared) >= 2
    assert max(compared.values()) < 48 << 20, compared
