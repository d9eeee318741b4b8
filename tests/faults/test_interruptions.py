"""Drivers that are killed, interrupted or cancelled: nothing stays, and the run can be gone on with."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from faulty_fits import Fault, Trained, assert_same, estimator, outcome
from pyspark.sql import DataFrame, SparkSession

from hvdspark import Store
from hvdspark.errors import StageLostError
from hvdspark.runs import RunRecord, read_record

HERE = Path(__file__).parent
_MARK = "HVDSPARK_TEST_DRIVER"


def marked(value: str) -> Iterator[psutil.Process]:
    """Go through all processes that come from a driver: they have its environment, whoever their parents are by now."""
    for process in psutil.process_iter():
        try:
            if process.environ().get(_MARK) == value and process.status() != psutil.STATUS_ZOMBIE:
                yield process
        except psutil.Error:
            continue


def wait_for(mark: Path, driver: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + 200
    while not mark.exists():
        assert driver is None or driver.poll() is None, "the driver ended by itself"
        assert time.monotonic() < deadline, "the fit did not come so far"
        time.sleep(0.05)


class Driver:
    """A driver of its own, which trains on two executors of its own until something happens to it."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.store = Store.create(folder / "store")
        self._value, self._mark = uuid.uuid4().hex, folder / "mark"
        program = str(HERE / "driver.py")
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, program, self.store.url, "run", str(self._mark)],
                env={**os.environ, _MARK: self._value, "PYTHONPATH": str(HERE.parent)},
                stdout=log,
                stderr=log,
            )

    @property
    def record(self) -> RunRecord:
        record = read_record(self.store, "run")
        assert record is not None
        return record

    def wait_until_it_trains(self) -> None:
        wait_for(self._mark, self._process)
        assert self.record.state == "running"
        assert [p for p in marked(self._value) if p.name() == "hvdspark-rank"]

    def end(self, how: signal.Signals) -> None:
        """End it, with all that it started within ten seconds."""
        self._process.send_signal(how)
        self._process.wait(10)
        _, alive = psutil.wait_procs(list(marked(self._value)), timeout=10)
        assert alive == []

    def clean_up(self) -> None:
        self._process.kill()
        self._process.wait()
        for process in marked(self._value):
            process.kill()


@pytest.mark.timeout(900)  # each driver is a Python and three Javas of its own
def test_drivers_that_end_leave_nothing_and_others_go_on(df: DataFrame, tmp_path: Path, undisturbed: Trained) -> None:
    with contextlib.ExitStack() as stack:
        # At the same time, for most of theirs is that of starting Python and Java.
        drivers = {how: Driver(tmp_path / how.name) for how in (signal.SIGKILL, signal.SIGINT)}
        for driver in drivers.values():
            stack.callback(driver.clean_up)
        for driver in drivers.values():
            driver.wait_until_it_trains()
        for how, driver in drivers.items():
            driver.end(how)
    for driver in drivers.values():
        assert driver.record.state == "interrupted"
        assert_same(outcome(estimator(driver.store, run_id="run").fit(df)), undisturbed)
        assert driver.record.state == "finished"


def test_a_cancelled_job_ends_the_fit_which_can_be_gone_on_with(
    spark: SparkSession, df: DataFrame, store: Store, tmp_path: Path, undisturbed: Trained
) -> None:
    mark = tmp_path / "mark"

    def cancel() -> None:
        wait_for(mark)
        spark.sparkContext.cancelAllJobs()

    thread = threading.Thread(target=cancel)
    thread.start()
    with pytest.raises(StageLostError, match="cancelled"):
        estimator(store, Fault(mark, 1, 2, 3, partial(time.sleep, 600)), run_id="run").fit(df)
    thread.join()
    record = read_record(store, "run")
    assert record is not None
    assert record.state == "interrupted"
    assert_same(outcome(estimator(store, run_id="run").fit(df)), undisturbed)


def test_fits_that_want_the_same_slots_take_turns(df: DataFrame, store: Store, undisturbed: Trained) -> None:
    found: dict[str, Trained] = {}
    # Made one after the other: Keras' seeds are the process's.
    estimators = {name: estimator(store, run_id=name) for name in ("one", "two")}

    def fit(name: str) -> None:
        found[name] = outcome(estimators[name].fit(df))

    threads = [threading.Thread(target=fit, args=(name,)) for name in estimators]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == ["one", "two"]
    for trained in found.values():
        assert_same(trained, undisturbed)
