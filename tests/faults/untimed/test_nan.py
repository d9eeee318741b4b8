"""Gradients that are no numbers: the fit fails by name, ends before them, or goes on as if the step had never been."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from faulty_fits import assert_same, log_of, outcome
from hvdspark.estimators import KerasEstimator
from pyspark.sql import DataFrame, SparkSession

from hvdspark import Store
from hvdspark.errors import WorkerFailedError

MASTER = "local-cluster[2,1,2048]"
BATCH = 16
STEPS = 12
# Without shuffling, rank 1 has the second half of the rows of each step.
STEP_ROWS = 2 * BATCH
BAD_STEP = 6
BAD_ROW = BAD_STEP * STEP_ROWS + BATCH + 3


def values() -> np.ndarray:
    random = np.random.default_rng(5)
    x = random.normal(size=(STEPS * STEP_ROWS, 3))
    return np.column_stack([x, x @ [1.0, -2.0, 0.5]])


def frame(spark: SparkSession, rows: np.ndarray) -> DataFrame:
    return spark.createDataFrame([tuple(map(float, row)) for row in rows], "a double, b double, c double, y double")


@pytest.fixture(scope="module")
def sick(spark: SparkSession) -> DataFrame:
    rows = values()
    rows[BAD_ROW, 1] = math.nan
    return frame(spark, rows)


def without(spark: SparkSession, first: int, stop: int) -> DataFrame:
    """Give the rows that are in none of these steps."""
    return frame(spark, np.delete(values(), slice(first * STEP_ROWS, stop * STEP_ROWS), axis=0))


def estimator(store: Store, **keywords: Any) -> KerasEstimator:
    keras.utils.set_random_seed(0)
    # All that keeps a state: statistics, a generator, momenta, metrics.
    layers = [keras.layers.Dense(8, activation="tanh"), keras.layers.BatchNormalization(), keras.layers.Dropout(0.2)]
    settings: dict[str, Any] = {
        "num_proc": 2,
        "epochs": 2,
        "batch_size": BATCH,
        "shuffle": False,
        "verbose": 0,
        "model": keras.Sequential([keras.Input((3,)), *layers, keras.layers.Dense(1)]),
        "optimizer": keras.optimizers.Adam(0.01),
        "loss": "mse",
        "metrics": ["mae"],
        "feature_cols": [["a", "b", "c"]],
        "label_cols": ["y"],
    }
    return KerasEstimator(store=store, **{**settings, **keywords})


@pytest.mark.parametrize(
    "keywords",
    [
        {"allreduce": "shared_memory"},
        # The steps of one update go together, those before the bad one too.
        {"allreduce": "horovod", "backward_passes_per_step": 3},
        {"num_proc": 1, "batch_size": STEP_ROWS},
    ],
    ids=["shared_memory", "horovod", "one_rank"],
)
def test_a_fit_that_skips_a_step_is_one_that_never_had_its_rows(
    spark: SparkSession, sick: DataFrame, store: Store, keywords: dict[str, Any]
) -> None:
    passes = keywords.get("backward_passes_per_step", 1)
    first = BAD_STEP // passes * passes
    found = outcome(estimator(store, on_nan="skip", run_id="sick", **keywords).fit(sick))
    expected = outcome(estimator(store, **keywords).fit(without(spark, first, first + passes)))
    assert found[0].pop("skipped_steps") == [1.0, 1.0]
    assert_same(found, expected)
    log = log_of(store, "sick")
    assert f"epoch 2: 1 of {STEPS} steps were left out, because gradients were not finite" in log


def test_a_model_that_runs_eagerly_skips_as_well(spark: SparkSession, sick: DataFrame, store: Store) -> None:
    def eager() -> keras.Model:
        model = estimator(store).getModel()
        model.compile(keras.optimizers.Adam(0.01), "mse", run_eagerly=True)
        return model

    found = outcome(estimator(store, model=eager(), on_nan="skip").fit(sick))
    expected = outcome(estimator(store, model=eager()).fit(without(spark, BAD_STEP, BAD_STEP + 1)))
    assert found[0].pop("skipped_steps") == [1.0, 1.0]
    assert_same(found, expected)


class StepLogger(keras.callbacks.CSVLogger):  # type: ignore[misc]
    """A writer, so that the first rank alone has it, which looks at every step."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        assert batch < BAD_STEP


def test_a_fit_that_stops_has_the_model_of_the_last_finite_step(
    spark: SparkSession, sick: DataFrame, store: Store, tmp_path: Path
) -> None:
    callbacks = [StepLogger(tmp_path / "epochs.csv")]
    model = estimator(store, on_nan="stop", run_id="sick", callbacks=callbacks, stall_timeout_s=120).fit(sick)
    assert_same(outcome(model), outcome(estimator(store, epochs=1).fit(without(spark, BAD_STEP, STEPS))))
    assert len(model.getHistory()["loss"]) == 1
    log = log_of(store, "sick")
    assert f"epoch 1, step {BAD_STEP + 1} of {STEPS}: gradients are not finite; the training ends" in log


def test_a_stop_at_the_first_step_of_an_epoch_leaves_the_model_of_the_one_before(
    spark: SparkSession, store: Store
) -> None:
    rows = values()
    rows[8 * STEP_ROWS, 0] = math.inf
    # Four epochs, each of a third of the rows.
    found = estimator(store, on_nan="stop", epochs=4, train_steps_per_epoch=4).fit(frame(spark, rows))
    expected = estimator(store, epochs=2, train_steps_per_epoch=4).fit(frame(spark, values()))
    assert_same(outcome(found), outcome(expected))


@pytest.mark.parametrize(
    "keywords",
    [{}, {"allreduce": "horovod", "controller": "mpi"}, {"allreduce": "horovod", "backward_passes_per_step": 7}],
    ids=["shared_memory", "mpi", "horovod"],
)
def test_a_fit_that_fails_names_rank_epoch_and_step_and_is_not_tried_again(
    sick: DataFrame, store: Store, keywords: dict[str, Any]
) -> None:
    where = f"epoch 1, step {BAD_STEP + 1} of {STEPS}"
    with pytest.raises(WorkerFailedError, match=rf"^rank 1 on .*NonFiniteLossError: {where}: the gradient of rank 1"):
        estimator(store, run_id="sick", **keywords).fit(sick)
    assert store.list("runs/sick/logs") == ["launch.json", "rank-0.log", "rank-1.log"]
    # Nothing with NaN was kept: what skips the step goes on from what there is, to the end.
    model = estimator(store, run_id="sick", on_nan="skip", **keywords).fit(sick)
    assert all(np.isfinite(weight).all() for weight in model.getModel().get_weights())


def test_nothing_can_be_stopped_before_the_first_step(spark: SparkSession, store: Store) -> None:
    rows = values()
    rows[0, 0] = math.nan
    with pytest.raises(WorkerFailedError, match=r"NonFiniteLossError: epoch 1, step 1: .* there is no model"):
        estimator(store, on_nan="stop").fit(frame(spark, rows))


def test_infinite_gradients_of_mixed_precision_are_no_failure(spark: SparkSession, store: Store) -> None:
    # Scaled by 32,768, these overflow float16 in the first steps.
    rows = values() * [1.0, 1.0, 1.0, 40.0]
    dense = keras.layers.Dense(1, dtype="mixed_float16")
    model = keras.Sequential([keras.Input((3,)), dense, keras.layers.Activation("linear", dtype="float32")])
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05))
    fitted = estimator(store, model=model, optimizer=optimizer, metrics=None).fit(frame(spark, rows))
    assert fitted.getHistory()["loss"][-1] < 0.5 * fitted.getHistory()["loss"][0]
    trained = fitted.getModel().optimizer
    assert float(trained.dynamic_scale.value) < 2.0**15, "some of them were infinite"


class NanLoss(keras.losses.Loss):
    """A loss that is no number in one epoch on one rank, while its gradients are well."""

    def call(self, y_true: Any, y_pred: Any) -> Any:
        bad = os.environ.get("HOROVOD_RANK") == "1"
        return keras.ops.square(y_true - y_pred) + (math.nan if bad else 0.0)


def test_a_loss_that_is_no_number_though_gradients_are_well_fails_at_the_end_of_the_epoch(
    spark: SparkSession, store: Store
) -> None:
    found = {"loss": NanLoss(), "custom_objects": {"NanLoss": NanLoss}, "run_id": "sick"}
    with pytest.raises(
        WorkerFailedError, match=r"^rank 1 on .*NonFiniteLossError: epoch 1: the loss of rank 1 is not finite"
    ):
        estimator(store, **found).fit(frame(spark, values()))
    assert store.list("runs/sick/checkpoints") == []
