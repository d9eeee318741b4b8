"""``data="direct"``: rows go from Spark's tasks to the ranks without a dataset in between."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pyarrow as pa
import pytest
from hvdspark.estimators import KerasEstimator, KerasModel
from pyspark import TaskContext
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from hvdspark import Store, show_run
from hvdspark.errors import NullValueError

ROWS = 400


def rows(spark: SparkSession) -> DataFrame:
    """Rows of several kinds, in more partitions than there are ranks and of different sizes, one of them empty."""
    return described(spark.range(0, ROWS, numPartitions=3).where("id < 100 OR id >= 200"))


def described(ids: DataFrame) -> DataFrame:
    return ids.selectExpr(
        "id",
        "array(float(id % 7), float(id % 3)) AS a",
        "IF(id % 2 = 0, 'even', 'odd') AS s",
        "double(id % 7) - 2 * (id % 3) + (id % 2) AS y",
    )


def network() -> keras.Model:
    keras.utils.set_random_seed(3)
    a, s = keras.Input((2,)), keras.Input((1,), dtype="string")
    looked_up = keras.layers.StringLookup(vocabulary=["even", "odd"], output_mode="one_hot")(s)
    return keras.Model([a, s], keras.layers.Dense(1)(keras.layers.Concatenate()([a, looked_up])))


def estimator(store: Store, **overrides: Any) -> KerasEstimator:
    given: dict[str, Any] = {
        "num_proc": 2,
        "store": store,
        "model": network(),
        "optimizer": keras.optimizers.SGD(0.01),
        "loss": "mse",
        "feature_cols": ["a", "s"],
        "label_cols": ["y"],
        "validation": 0.2,
        # All rows in one step, so that their order means nothing.
        "batch_size": ROWS,
        "epochs": 20,
        "verbose": 0,
    }
    return KerasEstimator(**{**given, **overrides})


def weights_of(model: KerasModel) -> list[np.ndarray]:
    return [np.asarray(weight) for weight in model.getModel().get_weights()]


def test_it_trains_and_validates_on_the_same_rows_as_a_dataset(
    spark: SparkSession, store: Store, tmp_path: Path
) -> None:
    df = rows(spark)
    written = estimator(store).fit(df)
    kept = store.list("datasets")
    direct = estimator(store, data="direct", run_id="direct").fit(df)
    for ours, theirs in zip(weights_of(direct), weights_of(written), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    for name in ("loss", "val_loss"):
        np.testing.assert_allclose(direct.getHistory()[name], written.getHistory()[name], rtol=1e-4)
    assert store.list("datasets") == kept
    of_written, of_direct = (show_run(store, str(model.getRunId())).record for model in (written, direct))
    for name in ("rows", "val_rows", "fingerprint"):
        assert of_direct.data[name] == of_written.data[name], name
    assert of_direct.data["rows"] + of_direct.data["val_rows"] == ROWS - 100
    assert len(of_direct.hosts) == 2
    assert direct.getHistory()["val_loss"][-1] < 0.5 * direct.getHistory()["val_loss"][0]


def late(df: DataFrame, partition: int) -> DataFrame:
    """The same rows, of which those of one partition come last."""

    def wait(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        if TaskContext.get().partitionId() == partition:
            time.sleep(1.5)
        yield from batches

    return df.mapInArrow(wait, df.schema)


def test_the_same_seed_gives_the_same_weights_whatever_comes_first(spark: SparkSession, store: Store) -> None:
    df = rows(spark)
    given = {"data": "direct", "batch_size": 7, "epochs": 2}
    found = {}
    for shuffle in (True, False):
        stage = estimator(store, **given, shuffle=shuffle)
        found[shuffle], second = (weights_of(stage.fit(late(df, partition))) for partition in (0, 2))
        for ours, theirs in zip(found[shuffle], second, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    reseeded = weights_of(estimator(store, **given, random_seed=5).fit(df))
    assert not np.allclose(found[True][0], reseeded[0], rtol=1e-3)
    # The order of the rows alone makes a difference, too.
    assert not np.allclose(found[True][0], found[False][0], rtol=1e-3)


def test_rows_in_order_give_the_weights_that_they_give_as_a_dataset(spark: SparkSession, store: Store) -> None:
    # In each partition as many for one rank as for the other.
    df = described(spark.range(0, ROWS, numPartitions=4))
    given = {"shuffle": False, "validation": None, "batch_size": 7, "epochs": 2}
    direct, written = (estimator(store, data=data, **given).fit(df) for data in ("direct", "petastorm"))
    for ours, theirs in zip(weights_of(direct), weights_of(written), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_small_steps_shuffled_and_cached_learn_as_well(spark: SparkSession, store: Store) -> None:
    df = rows(spark)
    model = estimator(store, data="direct", batch_size=7, epochs=30, cache="memory").fit(df)
    error = model.transform(df).selectExpr("avg((y - y__output) * (y - y__output)) AS mse").first()
    assert error is not None
    assert error["mse"] < 0.05


def test_what_is_wrong_with_the_rows_is_the_same_error_as_with_a_dataset(spark: SparkSession, store: Store) -> None:
    df = rows(spark).withColumn("y", F.when(F.col("id") % 10 != 0, F.col("y")))
    with pytest.raises(NullValueError, match="column 'y' has 30 nulls") as caught:
        estimator(store, data="direct").fit(df)
    assert (caught.value.column, caught.value.count) == ("y", 30)
