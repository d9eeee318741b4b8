"""What a fit does when something dies: it goes on from its last checkpoint, and ends as if nothing had happened."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import psutil
import pytest
from hvdspark.estimators import KerasEstimator
from pyspark.sql import DataFrame, SparkSession

from hvdspark import Store
from hvdspark.errors import ParamError, WorkerFailedError

MASTER = "local-cluster[2,1,2048]"
EPOCHS = 4
ROWS = 640


class Fault(keras.callbacks.Callback):
    """Does something once, on one rank, at the end of a step of an epoch."""

    def __init__(self, mark: Path, rank: int, epoch: int, step: int, act: Callable[[], None]) -> None:
        super().__init__()
        self._mark, self._rank, self._epoch, self._step, self._act = str(mark), rank, epoch, step, act
        self._now = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._now = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        here = (int(os.environ["HOROVOD_RANK"]), self._now, batch) == (self._rank, self._epoch, self._step)
        if here and not Path(self._mark).exists():
            Path(self._mark).touch()
            self._act()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_parent(mark: str) -> None:
    """Kill the nearest process above this rank whose command line has this in it, without a word to anybody."""
    next(p for p in psutil.Process().parents() if mark in " ".join(p.cmdline())).kill()
    time.sleep(60)


@pytest.fixture(scope="module")
def df(spark: SparkSession) -> DataFrame:
    random = np.random.default_rng(5)
    x = random.normal(size=(ROWS, 3))
    rows = [(*map(float, row), float(row[0] - 2 * row[1] + row[2] ** 2)) for row in x]
    # Whoever computes them again finds the same rows in the same order, as after a shuffle they would not.
    return spark.createDataFrame(spark.sparkContext.parallelize(rows, 4), "a double, b double, c double, y double")


def network() -> keras.Model:
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(16, activation="tanh"), keras.layers.BatchNormalization(), keras.layers.Dropout(0.2)]
    return keras.Sequential([keras.Input((3,)), *layers, keras.layers.Dense(1)])


def estimator(store: Store, *callbacks: Any, **keywords: Any) -> KerasEstimator:
    stopping = keras.callbacks.ReduceLROnPlateau(monitor="val_loss", patience=1, factor=0.5, min_delta=0.05)
    settings: dict[str, Any] = {"num_proc": 2, "epochs": EPOCHS, "batch_size": 32, "validation": 0.1, "verbose": 0}
    return KerasEstimator(
        store=store,
        model=network(),
        optimizer=keras.optimizers.Adam(0.01),
        loss="mse",
        metrics=["mae"],
        feature_cols=[["a", "b", "c"]],
        label_cols=["y"],
        callbacks=[stopping, *callbacks],
        **{**settings, **keywords},
    )


Trained = tuple[dict[str, list[float]], list[np.ndarray]]


def outcome(model: Any) -> Trained:
    return model.getHistory(), [np.asarray(weight) for weight in model.getModel().weights]


@pytest.fixture(scope="module")
def undisturbed(df: DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    store = Store.create(tmp_path_factory.mktemp("undisturbed") / "store")
    return outcome(estimator(store).fit(df))


def assert_same(found: Trained, expected: Trained) -> None:
    assert found[0].keys() == expected[0].keys()
    for name, values in expected[0].items():
        assert found[0][name] == pytest.approx(values, rel=1e-3, abs=1e-5), name
    for mine, theirs in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("rank", "controller"), [(0, "gloo"), (1, "mpi")])
def test_a_killed_rank_costs_an_epoch_at_most(
    df: DataFrame, store: Store, tmp_path: Path, undisturbed: Trained, rank: int, controller: str
) -> None:
    fault = Fault(tmp_path / "mark", rank, 2, 3, die)
    model = estimator(store, fault, controller=controller, run_id="killed").fit(df)
    assert (tmp_path / "mark").exists()
    assert_same(outcome(model), undisturbed)
    assert len(model.getHistory()["loss"]) == EPOCHS
    assert not [name for name in store.list("runs/killed/checkpoints") if name.startswith("state-")]
    logs = Path(store.path("runs/killed/logs/attempt-2/rank-0.log")).read_text()
    assert "going on from the checkpoint at epoch 3, step 0" in logs


def test_within_an_epoch_it_goes_on_from_the_step_that_was_kept(
    df: DataFrame, store: Store, tmp_path: Path, undisturbed: Trained
) -> None:
    fault = Fault(tmp_path / "mark", 1, 1, 7, die)
    model = estimator(store, fault, checkpoint_steps=5, run_id="steps").fit(df)
    assert_same(outcome(model), undisturbed)
    logs = Path(store.path("runs/steps/logs/attempt-2/rank-0.log")).read_text()
    # Steps are counted over all epochs, and an epoch has nine: this is step 15.
    assert "going on from the checkpoint at epoch 2, step 6" in logs


@pytest.mark.parametrize("lost", ["pyspark.daemon", "CoarseGrainedExecutorBackend"])
def test_a_lost_python_worker_or_executor_is_replaced_and_the_fit_goes_on(
    df: DataFrame, store: Store, tmp_path: Path, undisturbed: Trained, lost: str
) -> None:
    fault = Fault(tmp_path / "mark", 1, 2, 3, partial(kill_parent, lost))
    # A rank that is no fork of the warm pool has its executor among its parents.
    assert_same(outcome(estimator(store, fault, warm_pool=False).fit(df)), undisturbed)
    assert (tmp_path / "mark").exists()


def test_what_would_fail_again_is_not_tried_again(df: DataFrame, store: Store, tmp_path: Path) -> None:
    def fail() -> None:
        raise LookupError("the user's own mistake")

    fault = Fault(tmp_path / "mark", 1, 1, 3, fail)
    with pytest.raises(WorkerFailedError, match=r"^rank 1 on .*LookupError: the user's own mistake") as caught:
        estimator(store, fault, run_id="mistake").fit(df)
    assert not caught.value.is_passing
    assert "attempt-2" not in store.list("runs/mistake/logs")


def test_restarts_end_somewhere(df: DataFrame, store: Store) -> None:
    class Always(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if os.environ["HOROVOD_RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(WorkerFailedError, match=r"^rank 1 on .*SIGKILL"):
        estimator(store, Always(), max_restarts=1, run_id="always").fit(df)
    assert store.list("runs/always/logs") == ["attempt-2", "rank-0.log", "rank-1.log"]


def test_a_damaged_checkpoint_is_passed_over(df: DataFrame, store: Store, tmp_path: Path, undisturbed: Trained) -> None:
    states = store.path("runs/damaged/checkpoints")

    def act() -> None:
        last = max(Path(states).glob("state-*")) / "shared.npz"
        last.write_bytes(last.read_bytes()[:-7])
        os.kill(os.getpid(), signal.SIGKILL)

    model = estimator(store, Fault(tmp_path / "mark", 1, 2, 3, act), run_id="damaged").fit(df)
    assert_same(outcome(model), undisturbed)
    logs = Path(store.path("runs/damaged/logs/attempt-2/rank-0.log")).read_text()
    assert "is passed over" in logs
    assert "going on from the checkpoint at epoch 2, step 0" in logs


def test_a_run_that_was_interrupted_goes_on_from_a_new_driver(
    df: DataFrame, store: Store, tmp_path: Path, undisturbed: Trained
) -> None:
    fault = Fault(tmp_path / "mark", 1, 2, 3, die)
    with pytest.raises(WorkerFailedError):
        estimator(store, fault, max_restarts=0, run_id="again").fit(df)
    with pytest.raises(
        WorkerFailedError, match=r"ParamError: run_id='again' was begun with batch_size=32, and now it is 16"
    ):
        estimator(store, batch_size=16, run_id="again").fit(df)
    assert_same(outcome(estimator(store, run_id="again").fit(df)), undisturbed)
    with pytest.raises(ParamError, match=r"run_id='again' exists already .* and is finished"):
        estimator(store, run_id="again").fit(df)
