"""Three ranks on three executors: nothing here is even, neither the rows nor the steps."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from clusters import KERAS_RANK
from hvdspark.estimators import KerasEstimator
from pyspark.sql import SparkSession

import hvdspark
from hvdspark import Store
from hvdspark.errors import WorkerFailedError

MASTER = "local-cluster[3,1,1024]"


def test_three_ranks_meet_and_a_subset_can_talk_by_itself(spark: SparkSession) -> None:
    def work() -> tuple[int, float, float | None]:
        import horovod.tensorflow as hvd
        import tensorflow as tf

        pair = hvd.ProcessSet([0, 2])
        hvd.init(process_sets=[pair])
        value = tf.constant(float(hvd.rank()))
        everybody = float(hvd.allreduce(value, op=hvd.Sum, name="all"))
        some = float(hvd.allreduce(value, op=hvd.Sum, name="pair", process_set=pair)) if pair.included() else None
        # A rank that ends shuts Horovod down for all: nobody leaves before the pair is through.
        hvd.allreduce(value, name="everybody is through")
        return hvd.rank(), everybody, some

    assert hvdspark.run(work, num_proc=3, preload=KERAS_RANK) == [(0, 3.0, 2.0), (1, 3.0, None), (2, 3.0, 2.0)]


def test_the_rank_that_failed_first_is_the_root_cause(spark: SparkSession) -> None:
    def work() -> None:
        import horovod.tensorflow as hvd
        import tensorflow as tf

        hvd.init()
        hvd.allreduce(tf.zeros(1), name="all are there")
        if hvd.rank() == 2:
            raise KeyError("the cause")
        hvd.allreduce(tf.zeros(1), name="two are waiting")

    with pytest.raises(WorkerFailedError, match=r"^rank 2 on .*: KeyError: 'the cause'") as caught:
        hvdspark.run(work, num_proc=3, preload=KERAS_RANK)
    assert caught.value.root_cause == 2
    assert set(caught.value.failures) == {0, 1, 2}


def test_three_ranks_train_on_forty_partitions_as_one_rank_would(spark: SparkSession, store: Store) -> None:
    random = np.random.default_rng(3)
    x = random.normal(size=(500, 2))
    rows = [(float(a), float(b), float(a - b)) for a, b in x]
    df = spark.createDataFrame(spark.sparkContext.parallelize(rows, 40), "a double, b double, y double")
    keras.utils.set_random_seed(0)
    network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(4, activation="tanh"), keras.layers.Dense(1)])

    def fit(ranks: int) -> list[np.ndarray]:
        model = KerasEstimator(
            num_proc=ranks,
            store=store,
            model=network,
            optimizer=keras.optimizers.SGD(0.1),
            loss="mse",
            feature_cols=[["a", "b"]],
            label_cols=["y"],
            batch_size=48 // ranks,
            epochs=2,
            shuffle=False,
            scale_learning_rate=False,
            verbose=0,
        ).fit(df)
        assert model.getHistory()["loss"][1] < model.getHistory()["loss"][0]
        return [np.asarray(weight) for weight in model.getModel().get_weights()]

    for one, three in zip(fit(1), fit(3), strict=True):
        np.testing.assert_allclose(one, three, rtol=2e-5, atol=2e-6)
