"""Ranks that neither end nor go on: they are found, named with what they were doing, ended, and started again."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import psutil
import pytest
from clusters import KERAS_RANK
from faulty_fits import Fault, Trained, assert_same, estimator, log_of, outcome
from pyspark.sql import DataFrame, SparkSession
from unkillable import held

import hvdspark
from hvdspark import Store
from hvdspark.errors import WorkerFailedError

STALL_S = 5.0


def stop_my_group() -> None:
    os.killpg(0, signal.SIGSTOP)  # its guard as well


def never_return() -> None:
    while True:
        time.sleep(0.1)


# One that is stopped without its guard, over Gloo, is in test_soak.
@pytest.mark.parametrize(
    ("rank", "act", "controller", "allreduce"),
    [
        (0, stop_my_group, "mpi", "horovod"),
        (1, never_return, "mpi", "shared_memory"),
    ],
)
def test_a_rank_that_hangs_is_started_again_and_the_fit_goes_on(
    df: DataFrame,
    store: Store,
    tmp_path: Path,
    undisturbed: Trained,
    caplog: pytest.LogCaptureFixture,
    rank: int,
    act: Callable[[], None],
    controller: str,
    allreduce: str,
) -> None:
    fault = Fault(tmp_path / "mark", rank, 2, 3, act)
    ways = {"controller": controller, "allreduce": allreduce}
    fitted = estimator(store, fault, stall_timeout_s=STALL_S, run_id="hung", **ways).fit(df)
    assert_same(outcome(fitted), undisturbed)
    said = "did not move on" if act is never_return else "gave no sign of life"
    (restart,) = [record.message for record in caplog.records if "restart 1 of 3" in record.message]
    assert restart.startswith(f"hung: rank {rank} on ")
    assert said in restart
    if act is never_return:
        assert "epoch 3, step 4" in restart
    assert f"in {act.__name__}" in log_of(store, "hung", rank)


def test_a_rank_that_cannot_be_killed_is_named_and_the_fit_goes_on(
    df: DataFrame, store: Store, tmp_path: Path, undisturbed: Trained, caplog: pytest.LogCaptureFixture
) -> None:
    pid = tmp_path / "pid"

    def be_held() -> None:
        (tmp_path / "part").write_text(str(os.getpid()))
        (tmp_path / "part").rename(pid)
        never_return()

    with contextlib.ExitStack() as stack:
        hold = threading.Thread(target=lambda: stack.enter_context(held(int(read_when_there(pid)))))
        hold.start()
        fault = Fault(tmp_path / "mark", 1, 2, 3, be_held)
        fitted = estimator(store, fault, stall_timeout_s=STALL_S, run_id="held").fit(df)
        hold.join()
        rank = psutil.Process(int(pid.read_text()))
        assert rank.is_running(), "it was killed after all"
    assert_same(outcome(fitted), undisturbed)
    (restart,) = [record.message for record in caplog.records if "restart 1 of 3" in record.message]
    assert restart.startswith("held: rank 1 on ")
    assert f"process {rank.pid} (state t) cannot be killed" in restart


def read_when_there(path: Path) -> str:
    deadline = time.monotonic() + 200
    while not path.exists():
        assert time.monotonic() < deadline, "the fit did not come so far"
        time.sleep(0.05)
    return path.read_text()


class Slow(keras.layers.Layer):  # type: ignore[misc]
    """Lets every step take a while, so that the nine of an epoch take longer than a rank may stand still."""

    def call(self, x: Any) -> Any:
        import tensorflow as tf

        def wait(value: Any) -> Any:
            time.sleep(0.8)
            return value

        return tf.ensure_shape(tf.numpy_function(wait, [x], tf.float32), x.shape)

    def compute_output_shape(self, shape: Any) -> Any:
        return shape


def test_a_model_whose_steps_are_slow_is_not_taken_to_hang(
    df: DataFrame, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    model = keras.Sequential([keras.Input((3,)), Slow(), keras.layers.Dense(1)])
    settings = {"custom_objects": {"Slow": Slow}, "epochs": 1, "stall_timeout_s": STALL_S}
    fitted = estimator(store, run_id="slow", **settings).setModel(model).fit(df)
    assert len(fitted.getHistory()["loss"]) == 1
    assert "restart" not in caplog.text


def test_the_error_of_a_rank_that_hangs_shows_where(spark: SparkSession) -> None:
    def work() -> None:
        import horovod.tensorflow as hvd
        import tensorflow as tf

        hvd.init()
        hvdspark.moved_on("the first batch")
        if hvd.rank() == 1:
            hang_in_my_own_code()
        hvdspark.moved_on("waiting for the other")
        hvd.allreduce(tf.zeros(3), name="waits")

    def hang_in_my_own_code() -> None:
        time.sleep(600)

    started = time.monotonic()
    with pytest.raises(WorkerFailedError, match=r"^rank 1 on .*: the training did not move on for") as caught:
        hvdspark.run(work, num_proc=2, stall_timeout_s=STALL_S, preload=KERAS_RANK)
    assert "in hang_in_my_own_code" in str(caught.value)
    assert caught.value.root_cause == 1
    assert time.monotonic() - started < 60
