"""What is known of a run, also when its driver could say nothing more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hvdspark import Store
from hvdspark.errors import ParamError, StageLostError, WorkerFailedError
from hvdspark.recording import recorded
from hvdspark.runs import in_progress, log_folder, next_attempt, read_record, require_run


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store")


def test_a_run_is_running_while_its_driver_is_at_it_and_finished_then(store: Store) -> None:
    assert read_record(store, "a") is None
    with in_progress(store, "a"), recorded(store, "a"):
        record = read_record(store, "a")
        assert record is not None
        assert (record.state, record.ended, record.cause) == ("running", None, None)
    record = read_record(store, "a")
    assert record is not None
    assert record.ended is not None
    assert (record.state, record.cause) == ("finished", None)
    assert record.started <= record.ended


FAILED = WorkerFailedError(
    "rank 1 on here: ValueError: no\n\nlines",
    failures={1: ""},
    root_cause=1,
    log_tail="",
    is_passing=False,
    noticed=12.0,
)


@pytest.mark.parametrize(
    ("error", "state", "cause"),
    [
        (FAILED, "failed", "rank 1 on here: ValueError: no"),
        (MemoryError(), "failed", "MemoryError"),
        (KeyboardInterrupt(), "interrupted", "KeyboardInterrupt"),
        (StageLostError("job cancelled", is_passing=False, is_cancelled=True), "interrupted", "job cancelled"),
        (StageLostError("executor lost", is_passing=True, is_cancelled=False), "failed", "executor lost"),
        (StageLostError("not serializable", is_passing=False, is_cancelled=False), "failed", "not serializable"),
    ],
)
def test_an_error_is_kept_with_the_run(store: Store, error: BaseException, state: str, cause: str) -> None:
    with pytest.raises(type(error)), in_progress(store, "a"), recorded(store, "a"):
        raise error
    record = read_record(store, "a")
    assert record is not None
    assert (record.state, record.cause) == (state, cause)


def test_an_attempt_is_kept_with_when_its_failure_was_noticed(store: Store) -> None:
    with recorded(store, "a") as recording:
        with pytest.raises(WorkerFailedError), recording.attempt(2):
            raise FAILED
        with recording.attempt(2):
            pass
    record = read_record(store, "a")
    assert record is not None
    failed, went_through = record.attempts
    assert (failed.noticed, failed.cause) == (12.0, "rank 1 on here: ValueError: no")
    assert (went_through.noticed, went_through.cause) == (None, None)


def test_a_folder_without_a_record_is_not_taken_for_a_run_with_a_similar_name(store: Store) -> None:
    store.publish_bytes(b"{}", "runs/night/result.json")
    with pytest.raises(ParamError, match=r"the run 'night' has no record: .*runs/night has no run\.json") as told:
        require_run(store, "night")
    assert "Did you mean" not in str(told.value)
    with pytest.raises(ParamError, match=r"there is no run 'nigth' in .* Did you mean 'night'"):
        require_run(store, "nigth")


def test_the_logs_of_earlier_attempts_are_kept(store: Store) -> None:
    folders = []
    for _ in range(3):
        folders.append(log_folder("a", next_attempt(store, "a")))
        store.publish_bytes(b"", f"{folders[-1]}/rank-0.log")
    assert folders == ["runs/a/logs", "runs/a/logs/attempt-2", "runs/a/logs/attempt-3"]


def test_a_driver_that_is_gone_without_a_word_was_interrupted(store: Store) -> None:
    driver = (
        "import os, sys; from hvdspark import Store\n"
        "from hvdspark.recording import recorded; from hvdspark.runs import in_progress\n"
        "store = Store.create(sys.argv[1])\n"
        "with in_progress(store, 'a'), recorded(store, 'a'):\n"
        "    os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", driver, store.url], check=False).returncode == 9
    record = read_record(store, "a")
    assert record is not None
    assert (record.state, record.cause) == ("interrupted", "its driver is gone")


def test_a_record_that_cannot_be_written_does_not_stop_the_run(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    Path(store.path()).mkdir(parents=True)
    Path(store.path("runs")).write_text("in the way")
    with recorded(store, "a"):
        done = True
    assert done
    assert "cannot record that a is finished" in caplog.text
