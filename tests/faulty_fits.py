"""One small fit to which things happen, and what comes of it where nothing does."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import keras
import numpy as np
import psutil
import pytest
from hvdspark.estimators import KerasEstimator
from pyspark.sql import DataFrame, SparkSession

from hvdspark import Store

EPOCHS = 4
ROWS = 640

# Executors cannot import it.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


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


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def kill_python_workers() -> None:
    """Kill the Python workers of this rank's executor, its task among them, without a word to anybody."""
    for worker in _daemon().children():
        worker.kill()
    time.sleep(60)


def kill_executor() -> None:
    """Kill this rank's executor, without a word to anybody."""
    _daemon().parent().kill()
    time.sleep(60)


def _daemon() -> psutil.Process:
    """Find the process that starts the Python workers of this rank's executor."""
    own = psutil.Process()
    command = own.cmdline()
    if "hvdspark.worker.warm" not in command:
        return next(process for process in own.parents() if "pyspark.daemon" in process.cmdline()).parent()
    # Forks of the warm pool are nobody's descendants, but have its command line, and that tells with what it ends.
    place = command[command.index("hvdspark.worker.warm") + 4]
    return psutil.Process(int(place.partition("-")[0]))


@pytest.fixture(scope="module")
def df(spark: SparkSession) -> DataFrame:
    return rows_of(spark)


def rows_of(spark: SparkSession) -> DataFrame:
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


def log_of(store: Store, run_id: str, rank: int = 0) -> str:
    """Return the log of a rank."""
    return Path(store.path(f"runs/{run_id}/logs/rank-{rank}.log")).read_text()


@pytest.fixture(scope="session")
def _trained() -> list[Trained]:
    """What came of the fit to which nothing happens, once there was one: the same in all sessions."""
    return []


@pytest.fixture(scope="module")
def undisturbed(df: DataFrame, tmp_path_factory: pytest.TempPathFactory, _trained: list[Trained]) -> Trained:
    if not _trained:
        store = Store.create(tmp_path_factory.mktemp("undisturbed") / "store")
        _trained.append(outcome(estimator(store).fit(df)))
    return _trained[0]


def assert_same(found: Trained, expected: Trained) -> None:
    assert found[0].keys() == expected[0].keys()
    for name, values in expected[0].items():
        assert found[0][name] == pytest.approx(values, rel=1e-3, abs=1e-5), name
    for mine, theirs in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-5)
