"""Drivers that are killed, interrupted or cancelled: nothing stays, and the run can be gone on with."""

from __future__ import annotations

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
from hvdspark.runs import read_record

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


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_driver_that_ends_leaves_nothing_and_another_goes_on(
    df: DataFrame, store: Store, tmp_path: Path, undisturbed: Trained, how: signal.Signals
) -> None:
    value, mark = uuid.uuid4().hex, tmp_path / "mark"
    folder = Path(__file__).parent
    environment = {**os.environ, _MARK: value, "PYTHONPATH": str(folder.parent)}
    command = [sys.executable, str(folder / "driver.py"), store.url, "run", str(mark)]
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        try:
            wait_for(mark, driver)
            record = read_record(store, "run")
            assert record is not None
            assert record.state == "running"
            assert [p for p in marked(value) if p.name() == "hvdspark-rank"]
            driver.send_signal(how)
            driver.wait(10)
            _, alive = psutil.wait_procs(list(marked(value)), timeout=10)
            assert alive == []
        finally:
            driver.kill()
            driver.wait()
            for process in marked(value):
                process.kill()
    record = read_record(store, "run")
    assert record is not None
    assert record.state == "interrupted"
    assert_same(outcome(estimator(store, run_id="run").fit(df)), undisturbed)
    record = read_record(store, "run")
    assert record is not None
    assert record.state == "finished"


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
