"""``hvdspark train`` as a process of its own, seen from outside: errors of a rank, and signals."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from standalone import wait_for

from hvdspark import Store
from hvdspark.runs import read_record

pytestmark = pytest.mark.timeout(900)  # each test starts a JVM and a rank

PARTS = """
import os, time
from pathlib import Path

import keras


def network():
    return keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])


class Failing(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        raise ValueError("no such luck")


class Holding(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        Path(os.environ["MARK"]).touch()
        time.sleep(600)


def failing():
    return [Failing()]


def holding():
    return [Holding()]
"""

JOB = """
store: {folder}/store
run_id: nightly
input: {{path: {folder}/rows.parquet}}
estimator:
  model: train_parts:network
  loss: mse
  feature_cols: [x]
  label_cols: [y]
  num_proc: 1
  epochs: 3
  backend_env: {{MARK: {folder}/mark}}
spark: {{spark.master: "local[1]", spark.ui.enabled: false, spark.driver.host: 127.0.0.1}}
"""


def command_in(folder: Path) -> list[str]:
    """Write a job into a folder; returns the command that does it, but for a value to set."""
    x = np.random.default_rng(1).normal(size=512)
    pq.write_table(pa.table({"x": x, "y": 2 * x}), folder / "rows.parquet")
    (folder / "train_parts.py").write_text(PARTS)
    (folder / "job.yaml").write_text(JOB.format(folder=folder))
    return [sys.executable, "-m", "hvdspark", "train", "--config", str(folder / "job.yaml"), "--set"]


def result_in(output: str, folder: Path) -> dict[str, Any]:
    """Return the last line, which must be what lies in the Store."""
    result: dict[str, Any] = json.loads(output.splitlines()[-1])
    assert Store.create(folder / "store").read_json("runs", "nightly", "result.json") == result
    return result


def test_an_error_of_a_rank_is_for_good_and_its_words_are_the_cause(tmp_path: Path) -> None:
    failing = [*command_in(tmp_path), "estimator.callbacks=train_parts:failing"]
    done = subprocess.run(failing, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 70, done.stderr
    result = result_in(done.stdout, tmp_path)
    assert (result["state"], result["exit_code"], result["error"]) == ("failed", 70, "WorkerFailedError")
    assert result["cause"].startswith("rank 0 on ")
    assert "ValueError: no such luck" in result["cause"]


def rows_that_end_java(folder: Path) -> str:
    gone = "java_method('java.lang.System', 'exit', int(x * 0) + 7) IS NULL"
    query = f"SELECT x, y FROM parquet.`{folder}/rows.parquet` WHERE {gone}"
    return f"input={json.dumps({'sql': query})}"


def test_a_lost_jvm_may_be_tried_again(tmp_path: Path) -> None:
    # In local mode the tasks run in the driver's JVM.
    command = [*command_in(tmp_path), rows_that_end_java(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 75, done.stderr
    assert result_in(done.stdout, tmp_path)["exit_code"] == 75


@contextlib.contextmanager
def held_job(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a job that waits after its first epoch; on leaving it is killed if it still runs."""
    folder.mkdir()
    holding = [*command_in(folder), "estimator.callbacks=train_parts:holding"]
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(holding, cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def test_a_signal_interrupts_the_job_which_says_so(tmp_path: Path) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    with contextlib.ExitStack() as stack:
        # Side by side, because they start slowly.
        jobs = [stack.enter_context(held_job(tmp_path / number.name)) for number in numbers]
        for number, process in zip(numbers, jobs, strict=True):
            check_interrupted(number, process, tmp_path / number.name)


def check_interrupted(number: signal.Signals, process: subprocess.Popen[str], folder: Path) -> None:
    mark = folder / "mark"
    wait_for(lambda: mark.exists() or process.poll() is not None, "the first epoch", 600)
    assert mark.exists(), (folder / "log").read_text()
    os.kill(process.pid, number)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 130, (folder / "log").read_text()
    result = result_in(output, folder)
    assert (result["state"], result["exit_code"]) == ("interrupted", 130)
    assert result["cause"].startswith("interrupted")
    record = read_record(Store.create(folder / "store"), "nightly")
    assert record is not None
    assert record.state == "interrupted"
