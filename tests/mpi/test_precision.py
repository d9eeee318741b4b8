"""Half precision in training and on the wire: the same result under every control plane."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
from hvdspark.estimators import KerasEstimator
from pyspark.sql import DataFrame, SparkSession

from hvdspark import Store

MASTER = "local-cluster[2,2,2048]"

ROWS = 400

WAYS = (
    {"controller": "gloo", "allreduce": "horovod"},
    {"controller": "mpi", "allreduce": "horovod"},
    {"controller": "gloo", "allreduce": "shared_memory"},
)


@pytest.fixture(scope="module")
def rows(spark: SparkSession) -> DataFrame:
    x = np.random.default_rng(5).normal(size=(ROWS, 2))
    return spark.createDataFrame([(float(a), float(b), float(a - 2 * b)) for a, b in x], "a double, b double, y double")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One Store for all fits, so that the rows are written once."""
    return Store.create(tmp_path_factory.mktemp("store"))


@pytest.fixture
def network(policy: str) -> Iterator[Any]:
    before = keras.config.dtype_policy()
    keras.utils.set_random_seed(0)
    keras.config.set_dtype_policy(policy)
    yield keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Dense(16, activation="tanh"),
            keras.layers.Dense(1),
            keras.layers.Activation("linear", dtype="float32"),
        ]
    )
    keras.config.set_dtype_policy(before)


@pytest.mark.parametrize(
    ("policy", "compression", "ways"),
    [
        ("mixed_float16", "none", WAYS),
        ("mixed_bfloat16", "none", WAYS),
        # In shared memory nothing is compressed.
        ("float32", "fp16", WAYS[:2]),
    ],
)
def test_half_precision_trains_to_the_same_weights(
    rows: DataFrame, kept: Store, network: Any, policy: str, compression: str, ways: tuple[dict[str, str], ...]
) -> None:
    start = network.get_weights()
    found = []
    for way in ways:
        network.set_weights(start)
        estimator = KerasEstimator(
            num_proc=2,
            store=kept,
            model=network,
            optimizer=keras.optimizers.Adam(0.01),
            loss="mse",
            feature_cols=[["a", "b"]],
            label_cols=["y"],
            batch_size=32,
            epochs=4,
            verbose=0,
            gradient_compression=compression,
            **way,
        )
        trained: Any = estimator.fit(rows)
        losses = trained.getHistory()["loss"]
        assert np.isfinite(losses).all()
        assert losses[-1] < losses[0] / 4
        model = trained.getModel()
        assert {layer.dtype_policy.name for layer in model.layers if layer.weights} == {policy}
        scales = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
        assert scales == (policy == "mixed_float16")
        found.append([np.asarray(weight) for weight in model.get_weights()])
    for weights in found[1:]:
        for mine, first in zip(weights, found[0], strict=True):
            assert np.isfinite(mine).all()
            np.testing.assert_allclose(mine, first, rtol=1e-3, atol=1e-4)
