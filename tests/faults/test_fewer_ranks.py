"""A cluster that shrinks while a fit runs: it goes on with fewer ranks, if it may."""

from __future__ import annotations

import shutil
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import faulty_fits
import pytest
from faulty_fits import EPOCHS, Fault, Trained, assert_same, outcome
from pyspark.sql import DataFrame, SparkSession

from hvdspark import Store
from hvdspark.errors import NotEnoughSlotsError, ParamError, WorkerFailedError
from hvdspark.launch.slots import count_slots

OWN_SESSION = True


def fail() -> None:
    raise LookupError("the user's own mistake")


def lose_an_executor(spark: SparkSession, mark: Path) -> None:
    """Take an executor away for good, once the fit has come to the mark."""
    while not mark.exists():
        time.sleep(0.05)
    scala = spark.sparkContext._jsc.sc()
    (executor, *_) = [name for name in _executors(spark) if name != "driver"]
    assert scala.killExecutor(executor)


def _executors(spark: SparkSession) -> list[str]:
    infos = spark.sparkContext._jsc.sc().statusStore().executorList(True)
    return [infos.apply(number).id() for number in range(infos.length())]


def request_executors(spark: SparkSession, count: int) -> None:
    scala = spark.sparkContext._jsc.sc()
    nowhere = spark.sparkContext._jvm.org.apache.spark.api.python.PythonUtils.toScalaMap({})
    scala.requestTotalExecutors(count, 0, nowhere)
    wait_for_slots(spark, count)


def wait_for_slots(spark: SparkSession, count: int) -> None:
    deadline = time.monotonic() + 60
    while count_slots(spark) != count:
        assert time.monotonic() < deadline
        time.sleep(0.2)


estimator = partial(faulty_fits.estimator, slots_timeout_s=2)


def test_more_ranks_than_before_can_go_on_too(spark: SparkSession, df: DataFrame, store: Store, tmp_path: Path) -> None:
    request_executors(spark, 2)
    with pytest.raises(WorkerFailedError):
        estimator(store, Fault(tmp_path / "mark", 0, 2, 3, fail), num_proc=1, run_id="grown").fit(df)
    model = estimator(store, run_id="grown").fit(df)
    history = model.getHistory()
    assert len(history["loss"]) == EPOCHS
    assert history["loss"][-1] < history["loss"][0]
    log = Path(store.path("runs/grown/logs/attempt-2/rank-0.log")).read_text()
    assert "going on from the checkpoint at epoch 3, step 0" in log


# With states within epochs, of which only those at the ends of epochs can be gone on from.
STATES: dict[str, Any] = {"checkpoint_steps": 2, "keep_checkpoints": 1}


@dataclass(frozen=True)
class Interrupted:
    """A Store with a run of two ranks that has failed, and what came of it where a driver went on with one."""

    store: Store
    planned: Trained


@pytest.fixture(scope="module")
def interrupted(spark: SparkSession, df: DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Interrupted:
    request_executors(spark, 2)
    folder = tmp_path_factory.mktemp("interrupted")
    store, kept = Store.create(folder / "store"), folder / "kept"
    with pytest.raises(WorkerFailedError):
        estimator(store, Fault(folder / "mark", 1, 2, 3, fail), run_id="resumed", **STATES).fit(df)
    shutil.copytree(store.url, kept)
    planned = outcome(estimator(store, num_proc=1, run_id="resumed", **STATES).fit(df))
    shutil.rmtree(store.url)
    kept.rename(store.url)
    return Interrupted(store, planned)


def test_a_new_driver_goes_on_with_fewer_ranks_but_begins_nothing_with_them(
    spark: SparkSession,
    df: DataFrame,
    interrupted: Interrupted,
    store: Store,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "mark").touch()
    lose_an_executor(spark, tmp_path / "mark")
    wait_for_slots(spark, 1)
    model = estimator(interrupted.store, min_proc=1, run_id="resumed", **STATES).fit(df)
    assert "resumed: goes on with 1 ranks in place of 2" in caplog.text
    history = model.getHistory()
    assert len(history["loss"]) == EPOCHS
    assert history["loss"][-1] < history["loss"][0]
    assert_same(outcome(model), interrupted.planned)
    with pytest.raises(NotEnoughSlotsError, match="needs 2 slots, the cluster can run 1 at once"):
        estimator(store, min_proc=1, run_id="new").fit(df)


@pytest.mark.parametrize("data", ["petastorm", "direct"])
def test_a_fit_goes_on_with_the_ranks_that_are_left(
    spark: SparkSession,
    df: DataFrame,
    interrupted: Interrupted,
    store: Store,
    tmp_path: Path,
    data: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    mark = tmp_path / "mark"
    request_executors(spark, 2)
    fault = Fault(mark, 1, 2, 3, partial(time.sleep, 600))
    loss = threading.Thread(target=lose_an_executor, args=(spark, mark))
    loss.start()
    model = estimator(store, fault, min_proc=1, run_id="shrunk", data=data, **STATES).fit(df)
    loss.join()
    assert "goes on with 1 ranks in place of 2" in caplog.text
    log = Path(store.path("runs/shrunk/logs/attempt-2/rank-0.log")).read_text()
    assert "going on from the checkpoint at epoch 3, step 0" in log

    history = model.getHistory()
    assert [len(values) for values in history.values()] == [EPOCHS] * len(history)
    assert history["loss"][-1] < history["loss"][0]
    if data == "petastorm":  # the rows of the other come in another order each time
        assert_same(outcome(model), interrupted.planned)


def test_more_than_all_ranks_cannot_be_demanded(df: DataFrame, store: Store) -> None:
    with pytest.raises(ParamError, match="min_proc=3 is more than the 2 ranks"):
        estimator(store, min_proc=3).fit(df)
