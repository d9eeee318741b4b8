"""Exit codes: what a scheduler is told about each kind of error."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from hvdspark.estimators.job.result import JobResult, read_result
from py4j.protocol import Py4JNetworkError
from pyspark.errors import NumberFormatException, PySparkException, PythonException

from hvdspark import Store, cli, errors
from hvdspark.cli.exits import Exit, exit_code
from hvdspark.cli.jobs import cause_of, terminable
from hvdspark.launch.failures import lost_stage
from hvdspark.lease import held

ROOT = Path(__file__).parents[2]

BAD_CAST = "[CAST_INVALID_INPUT] The value 'x' cannot be cast to \"INT\". SQLSTATE: 22018"
BAD_FILE = "Lost task 0.0 in stage 1.0: [FAILED_READ_FILE.NO_HINT] Encountered error while reading file /x"

TASK = """
  An exception was thrown from the Python worker. Please see the stack trace below.
Traceback (most recent call last):
  File "arrays.py", line 7, in to_block
    raise has_nulls(spec.name)
"""


def failed(*, is_passing: bool) -> errors.WorkerFailedError:
    fields = {"failures": {0: "x"}, "root_cause": 0, "log_tail": "", "noticed": 1.0}
    return errors.WorkerFailedError("x", is_passing=is_passing, **fields)


def lost(cause: Exception) -> errors.StageLostError:
    error = lost_stage(cause)
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("exc", "code"),
    [
        (errors.ParamError("x", param="epochs"), Exit.CONFIG),
        (errors.SchemaError("x", column="a", expected="b", found="c"), Exit.CONFIG),
        (errors.EmptyDatasetError("x"), Exit.DATA),
        (errors.CorruptDatasetError("x"), Exit.DATA),
        (errors.NotEnoughSlotsError("x", needed=2, available=1), Exit.TRY_AGAIN),
        (errors.LaunchTimeoutError("x"), Exit.TRY_AGAIN),
        (errors.RendezvousError("x", is_passing=True), Exit.TRY_AGAIN),
        (errors.RendezvousError("x", is_passing=False), Exit.CONFIG),
        (errors.LaunchError("x", is_passing=True), Exit.TRY_AGAIN),
        (errors.LaunchError("x"), Exit.CONFIG),
        (lost(PySparkException("ExecutorLostFailure (executor 1 exited)")), Exit.TRY_AGAIN),
        (lost(PySparkException("Job 3 cancelled as part of cancellation of all jobs")), Exit.INTERRUPTED),
        (lost(PySparkException("Task not serializable: a lock")), Exit.FAILED),
        (lost(NumberFormatException(BAD_CAST)), Exit.DATA),
        (NumberFormatException(BAD_CAST), Exit.DATA),
        (PySparkException(BAD_FILE), Exit.DATA),
        (PySparkException(BAD_FILE + "\nCaused by: java.net.SocketTimeoutException: Read timed out"), Exit.TRY_AGAIN),
        (PySparkException(BAD_FILE + "\nExecutorLostFailure (executor 1 exited)"), Exit.TRY_AGAIN),
        (PySparkException("Job aborted: Lost task 0.0 in stage 1.0: java.lang.RuntimeException: no"), Exit.FAILED),
        (lost(Py4JNetworkError("Answer from Java side is empty")), Exit.TRY_AGAIN),
        (failed(is_passing=True), Exit.TRY_AGAIN),
        (failed(is_passing=False), Exit.FAILED),
        (errors.RunInProgressError("x", run_id="a"), Exit.TRY_AGAIN),
        (errors.StoreError("x", url="/x"), Exit.TRY_AGAIN),
        (errors.AliasConflictError("x", alias="a", expected="b", found="c"), Exit.TRY_AGAIN),
        (errors.ModelFormatError("x"), Exit.FAILED),
        (KeyboardInterrupt("SIGTERM"), Exit.INTERRUPTED),
        (ValueError("the user's own"), Exit.FAILED),
        (Py4JNetworkError("Answer from Java side is empty"), Exit.TRY_AGAIN),
        (PythonException(TASK + "ValueError: the user's own"), Exit.FAILED),
        (PythonException(TASK + "hvdspark.errors.NullValueError: column 'x' has 7 nulls"), Exit.DATA),
    ],
)
def test_each_error_has_its_code(exc: BaseException, code: Exit) -> None:
    assert exit_code(exc) == code


def test_the_cause_is_the_line_that_says_what_was_raised() -> None:
    assert cause_of(PythonException(TASK + "ValueError: the user's own")) == "ValueError: the user's own"
    assert cause_of(ValueError("one\ntwo")) == "ValueError: one"
    assert cause_of(errors.DataError("one\ntwo")) == "one"
    assert cause_of(KeyboardInterrupt("SIGTERM")) == "interrupted by SIGTERM"


def test_a_termination_ends_the_block_as_an_interrupt() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="SIGTERM"), terminable():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train"], "Missing option '--config'"),
        (["train", "--config", "x", "--epochs", "3"], "No such option"),
        (["score", "--model", "/m", "--output", "/o", "--mode", "x"], "is not one of"),
    ],
)
def test_a_wrong_command_line_is_usage(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(cli.main, arguments)
    assert done.exit_code == Exit.USAGE
    assert message in done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["exit_code"], result["state"]) == (64, "failed")
    assert message in result["cause"]


def test_a_wrong_configuration_is_told_and_left_where_the_run_is_looked_for(tmp_path: Path) -> None:
    path, store = tmp_path / "job.yaml", Store.create(tmp_path / "store")
    path.write_text(f"store: {store.url}\ninput: {{path: /x}}\nestimator: {{model: nowhere:network}}\n")
    done = CliRunner().invoke(cli.main, ["train", "--config", str(path), "--run-id", "nightly"])
    assert done.exit_code == Exit.CONFIG
    result = json.loads(done.stdout)
    assert "there is no module 'nowhere'" in result["cause"]
    assert (result["run_id"], result["state"], result["error"]) == ("nightly", "failed", "ParamError")
    assert store.read_json("runs", "nightly", "result.json") == result
    assert read_result(store, "nightly") == JobResult(**result)

    unnamed = CliRunner().invoke(cli.main, ["train", "--config", str(path)])
    assert unnamed.exit_code == Exit.CONFIG
    assert store.list("runs") == ["nightly"]


def test_a_wrong_configuration_leaves_the_run_of_another_driver_and_a_finished_one_as_they_are(tmp_path: Path) -> None:
    path, store = tmp_path / "job.yaml", Store.create(tmp_path / "store")
    path.write_text(f"store: {store.url}\ninput: {{path: /x}}\nestimator: {{model: nowhere:network}}\n")
    command = ["train", "--config", str(path), "--run-id", "nightly"]
    with held(store, "runs/nightly", "job"):
        done = CliRunner().invoke(cli.main, command)
    assert (done.exit_code, store.list("runs", "nightly")) == (Exit.CONFIG, [])

    JobResult("nightly", "finished", 0, model="/m").publish(store)
    before = store.read_bytes("runs", "nightly", "result.json")
    for arguments in (["--check"], ["--check", "--set", "loss=msee"]):
        done = CliRunner().invoke(cli.main, [*command, *arguments])
        assert (done.exit_code, json.loads(done.stdout)["state"]) == (Exit.CONFIG, "failed")
        assert store.read_bytes("runs", "nightly", "result.json") == before
    store.delete("runs", "nightly")
    assert CliRunner().invoke(cli.main, [*command, "--check"]).exit_code == Exit.CONFIG
    assert not store.exists("runs", "nightly")


PARTS = """
import keras
from pyspark.ml.feature import StringIndexer

def network(units=1):
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(units)])

def stages():
    return [StringIndexer(inputCol="a", outputCol="b")]

def misspelt():
    return [StringIndexer(inputCl="a", outputCol="b")]

def broken():
    return [undefined]
"""


@pytest.mark.parametrize(
    ("arguments", "code", "cause"),
    [
        ([], 0, None),
        (
            ["--set", "pipeline=check_parts:stages"],
            0,
            "not checked, for want of Spark: the stages of check_parts:stages",
        ),
        (["--set", "pipeline=check_parts:misspelt"], 70, "unexpected keyword argument 'inputCl'"),
        (["--set", "pipeline=check_parts:broken"], 70, "NameError: name 'undefined' is not defined"),
        (["--set", "pipeline=check_parts:stages", "--set", "estimator.model_args={unit: 2}"], 78, "cannot be called"),
        (["--set", "estimator.model_args={units: 0}"], 70, "units"),
        (["--set", "estimator.model=/nowhere.keras"], 78, "cannot read /nowhere.keras"),
    ],
)
def test_checking_a_configuration_makes_what_takes_no_spark(
    tmp_path: Path, arguments: list[str], code: int, cause: str | None
) -> None:
    path = tmp_path / "job.yaml"
    (tmp_path / "check_parts.py").write_text(PARTS)
    network = "{model: check_parts:network, loss: mse}"
    path.write_text(f"store: {tmp_path}/store\ninput: {{path: /x}}\nestimator: {network}\n")
    done = CliRunner().invoke(cli.main, ["train", "--config", str(path), "--check", *arguments])
    result = json.loads(done.stdout)
    assert (done.exit_code, result["state"]) == (code, "failed" if code else "checked")
    assert cause is None or cause in result["cause"]
    assert not (tmp_path / "store").exists()


def test_the_command_that_the_readme_shows_checks_the_example() -> None:
    line = "hvdspark train --config examples/submit/job.yaml --check"
    assert line in (ROOT / "README.md").read_text()
    done = subprocess.run([sys.executable, "-m", *line.split()], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "features:stages, which are Spark's own; the network of features:network" in json.loads(done.stdout)["cause"]


def test_a_finished_run_gives_its_result_again(tmp_path: Path) -> None:
    path, store = tmp_path / "job.yaml", Store.create(tmp_path / "store")
    path.write_text(f"store: {store.url}\ninput: {{path: /x}}\nestimator: {{model: nowhere:network}}\n")
    JobResult("nightly", "finished", 0, model="/m", metrics={"val_loss": float("nan")}, promoted=False).publish(store)
    done = CliRunner().invoke(cli.main, ["train", "--config", str(path), "--run-id", "nightly"])
    assert done.exit_code == 0
    result = json.loads(done.stdout)
    assert (result["model"], result["promoted"], result["metrics"]) == ("/m", False, {"val_loss": None})
