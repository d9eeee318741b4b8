"""What a fit does when something dies: it goes on from its last checkpoint, and ends as if nothing had happened."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from faulty_fits import EPOCHS, Fault, Trained, assert_same, die, estimator, kill_executor, kill_python_workers, outcome
from pyspark.sql import DataFrame

from hvdspark import Store
from hvdspark.errors import ParamError, WorkerFailedError


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


def test_one_rank_on_one_thread_goes_on_to_the_very_same_model(df: DataFrame, store: Store, tmp_path: Path) -> None:
    threads = dict.fromkeys(("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"), "1")
    alone: dict[str, Any] = {"num_proc": 1, "backend_env": threads, "checkpoint_steps": 7}
    expected = outcome(estimator(store, **alone).fit(df))
    found = outcome(estimator(store, Fault(tmp_path / "mark", 0, 2, 12, die), run_id="exact", **alone).fit(df))
    log = Path(store.path("runs/exact/logs/attempt-2/rank-0.log")).read_text()
    assert "going on from the checkpoint at epoch 3, step 6" in log
    assert found[0] == expected[0]
    for mine, theirs in zip(found[1], expected[1], strict=True):
        np.testing.assert_array_equal(mine, theirs)


# With the warm pool they are lost in test_soak.
@pytest.mark.parametrize("lose", [kill_python_workers, kill_executor])
def test_a_lost_python_worker_or_executor_is_replaced_and_the_fit_goes_on_without_a_warm_pool(
    df: DataFrame, store: Store, tmp_path: Path, undisturbed: Trained, lose: Callable[[], None]
) -> None:
    fault = Fault(tmp_path / "mark", 1, 2, 3, lose)
    assert_same(outcome(estimator(store, fault, warm_pool=False).fit(df)), undisturbed)
    assert (tmp_path / "mark").exists()


class EndOfTheReader(keras.callbacks.Callback):
    """Ends the first process that reads it as this rank, before that begins with its work."""

    def __init__(self, mark: Path, rank: int) -> None:
        super().__init__()
        self._place = str(mark), rank

    def __reduce__(self) -> Any:
        return end_once, self._place


def end_once(mark: str, rank: int) -> keras.callbacks.Callback:
    if os.environ.get("HOROVOD_RANK") == str(rank) and not Path(mark).exists():
        Path(mark).touch()
        die()
    return keras.callbacks.Callback()


@pytest.mark.parametrize("warm_pool", [True, False])
def test_a_rank_that_is_killed_while_it_is_launched_is_started_again(
    df: DataFrame,
    store: Store,
    tmp_path: Path,
    undisturbed: Trained,
    caplog: pytest.LogCaptureFixture,
    warm_pool: bool,
) -> None:
    end = EndOfTheReader(tmp_path / "mark", 1)
    assert_same(outcome(estimator(store, end, warm_pool=warm_pool, run_id="early").fit(df)), undisturbed)
    (restart,) = [record.message for record in caplog.records if "restart 1 of 3" in record.message]
    assert re.match("early: rank 1 on .*: the training process was killed by SIGKILL before it began", restart)


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
    assert store.list("runs/always/logs") == ["attempt-2", "launch.json", "rank-0.log", "rank-1.log"]


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
    with pytest.raises(
        WorkerFailedError, match=r"ParamError: run_id='again' was begun with other rows, though as many"
    ):
        estimator(store, run_id="again").fit(df.withColumn("y", df.y + 1))
    assert_same(outcome(estimator(store, run_id="again").fit(df)), undisturbed)
    with pytest.raises(ParamError, match=r"run_id='again' exists already .* and is finished"):
        estimator(store, run_id="again").fit(df)
