"""What a fit does when its Store is full or out of reach: it goes on, or ends so that it can go on later."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import keras
import pytest
from faulty_fits import Fault, Trained, assert_same, die, estimator, log_of, outcome
from hvdspark.estimators import BestOf
from pyspark.sql import DataFrame

from hvdspark import Store
from hvdspark.errors import WorkerFailedError

MASTER = "local-cluster[2,1,2048]"


class Between(keras.callbacks.Callback):
    """Does something on rank 0 when an epoch begins, and something else when another one does."""

    def __init__(self, first: int, begin: Callable[[], None], last: int, end: Callable[[], None]) -> None:
        super().__init__()
        self._acts = {first: begin, last: end}

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if os.environ["HOROVOD_RANK"] == "0" and epoch in self._acts:
            self._acts[epoch]()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Store]:
    """A Store on a file system of its own, of a megabyte."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a file system: {mounted.stderr.strip()}")
    try:
        yield Store.create(folder)
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(ballast: Path) -> None:
    """Leave no room, not for a byte."""
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return


def all_files(folder: str) -> list[str]:
    return [path.name for path in Path(folder).rglob("*") if path.is_file()]


def test_a_disk_that_is_full_for_a_while_costs_checkpoints_and_nothing_else(
    df: DataFrame, small: Store, undisturbed: Trained
) -> None:
    ballast = Path(small.path("ballast"))
    full = Between(1, partial(fill, ballast), 3, ballast.unlink)
    fitted = estimator(small, full, checkpoint_callback=BestOf("loss"), run_id="full", checkpoint_steps=5).fit(df)
    assert_same(outcome(fitted), undisturbed)
    assert not [name for name in all_files(small.url) if name.endswith(".part")]
    assert small.list("runs/full/checkpoints") == ["best.keras", "last.keras"]


def test_a_model_that_finds_no_room_is_an_error_and_the_run_goes_on_when_there_is(
    df: DataFrame, small: Store, undisturbed: Trained
) -> None:
    ballast = Path(small.path("ballast"))
    full = Between(2, partial(fill, ballast), 9, ballast.unlink)
    with pytest.raises(
        WorkerFailedError,
        match=r"^rank 0 on .*: StoreError: cannot write .*/runs/full/model.keras: \[Errno 28\] No space left on .*"
        r" fit with run_id='full' goes on",
    ) as caught:
        estimator(small, full, run_id="full").fit(df)
    assert not caught.value.is_passing
    assert "no checkpoint of step 27" in str(caught.value)
    assert "attempt-2" not in small.list("runs/full/logs")
    assert not [name for name in all_files(small.url) if name.endswith(".part")]
    # An epoch has nine steps: the two states before the disk was full are whole, and nothing is left of the others.
    states = [name for name in small.list("runs/full/checkpoints") if name.startswith("state-")]
    assert states == ["state-000000000009", "state-000000000018"]
    ballast.unlink()
    assert_same(outcome(estimator(small, run_id="full").fit(df)), undisturbed)
    log = Path(small.path("runs/full/logs/attempt-2/rank-0.log")).read_text()
    assert "going on from the checkpoint at epoch 3, step 0" in log


def move(here: str, there: str) -> None:
    assert not Path(there).exists(), "somebody has made it anew"
    Path(here).rename(there)


def test_a_store_that_is_out_of_reach_for_a_while_costs_checkpoints_and_nothing_else(
    df: DataFrame, store: Store, tmp_path: Path, undisturbed: Trained
) -> None:
    aside = str(tmp_path / "aside")
    gone = Between(1, partial(move, store.url, aside), 3, partial(move, aside, store.url))
    assert_same(outcome(estimator(store, gone, run_id="gone").fit(df)), undisturbed)
    log = log_of(store, "gone")
    assert "the last model is kept in memory until it can be written" in log
    assert "no checkpoint of step 18: cannot write" in log
    assert "has gone, or its file system is no longer mounted" in log


def test_a_run_whose_store_is_out_of_reach_does_not_begin_anew_in_an_empty_one(
    df: DataFrame, store: Store, tmp_path: Path, undisturbed: Trained
) -> None:
    aside = str(tmp_path / "aside")

    def lose() -> None:
        move(store.url, aside)
        die()

    with pytest.raises(WorkerFailedError, match=r"rank \d on .*has gone"):
        estimator(store, Fault(tmp_path / "mark", 1, 2, 3, lose), run_id="gone").fit(df)
    assert not Path(store.url).exists()
    Path(aside).rename(store.url)
    assert_same(outcome(estimator(store, run_id="gone").fit(df)), undisturbed)
