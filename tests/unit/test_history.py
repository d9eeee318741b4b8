"""What a run measured and how far it is, as its folder holds it."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
from pathlib import Path
from typing import Any

import pytest

from hvdspark import Store
from hvdspark.errors import StoreError
from hvdspark.history import (
    EpochRecord,
    Progress,
    RankTimes,
    epoch_table,
    read_history,
    read_progress,
    write_history,
    write_progress,
)
from hvdspark.worker.reporter import Reporter

FAST = RankTimes(0, "alpha", seconds=10.0, data_wait_s=1.0, allreduce_s=6.0, compute_s=3.0)
SLOW = RankTimes(1, "beta", seconds=10.5, data_wait_s=0.5, allreduce_s=0.25, compute_s=9.75)


def record(epoch: int, **changes: Any) -> EpochRecord:
    metrics = {"loss": 0.5 / epoch, "val_loss": 1.0}
    found = EpochRecord(epoch, 1e9 + epoch, 10.0, 2000, 200.0, 0.002, metrics, 1.5, (FAST, SLOW))
    return dataclasses.replace(found, **changes)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store")


def test_a_history_is_read_as_it_was_written(store: Store) -> None:
    assert read_history(store, "a") == ()
    write_history(store, "a", [record(1)])
    write_history(store, "a", [record(1), record(2, learning_rate=None, validation_s=None)])
    first, second = read_history(store, "a")
    assert first == record(1)
    assert (second.epoch, second.learning_rate, second.validation_s) == (2, None, None)


def test_what_is_not_finite_is_valid_json_and_reads_as_no_number(store: Store) -> None:
    write_history(store, "a", [record(1, metrics={"loss": math.inf, "mae": math.nan}, learning_rate=math.nan)])
    write_progress(store, "a", Progress(1, 2, 3, 4, 5.0, math.nan, {"mae": -math.inf}))

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is no JSON")

    for name in ("history.json", "progress.json"):
        json.loads(store.read_bytes("runs", "a", name), parse_constant=refuse)
    (found,) = read_history(store, "a")
    assert all(math.isnan(found.metrics[name]) for name in ("loss", "mae"))
    progress = read_progress(store, "a")
    assert progress is not None
    assert progress.loss is None
    assert math.isnan(progress.metrics["mae"])


def test_what_a_later_version_adds_is_left_out_and_what_is_no_history_is_named(store: Store) -> None:
    values = record(1).to_plain()
    values["ranks"][0]["gpu_s"] = 1.0
    store.publish_bytes(
        json.dumps({"epochs": [{**values, "power_w": 90}], "version": 2}).encode(), "runs/a/history.json"
    )
    assert read_history(store, "a") == (record(1),)
    del values["seconds"]
    store.publish_bytes(json.dumps({"epochs": [values]}).encode(), "runs/a/history.json")
    with pytest.raises(StoreError, match=r"runs/a/history.json is damaged, or of another version"):
        read_history(store, "a")


def test_the_slowest_rank_is_the_one_that_waits_least_for_the_others() -> None:
    assert record(1).slowest == SLOW
    assert record(1).span("allreduce_s") == (0.25, 6.0)
    assert record(1, ranks=(FAST,)).slowest is None


def test_the_table_has_a_line_per_epoch_and_names_the_slowest_rank() -> None:
    table = epoch_table([record(1), record(2, metrics={"loss": 0.25, "mae": 0.125}, validation_s=None)])
    assert repr(table) == str(table)
    titles, first, second = table.splitlines()
    assert len(titles) == len(first) == len(second)
    for title in ("epoch", "loss", "val_loss", "mae", "rows/s", "data wait", "allreduce", "compute", "slowest rank"):
        assert title in titles
    for cell in (
        "0.5",
        "0.002",
        "10.00 s",
        "1.50 s",
        "0.50-1.00 s",
        "0.25-6.00 s",
        "3.00-9.75 s",
        "1 on beta, 10.25 s",
    ):
        assert cell in first
    assert second.split()[:4] == ["2", "0.25", "-", "0.125"]
    assert epoch_table([]) == "no epochs are known"


class Gate:
    """Holds a Store's writing until it is opened."""

    def __init__(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened, self.reached = threading.Event(), threading.Event()
        publish = store.publish_bytes

        def slow(data: bytes, *parts: str) -> None:
            self.reached.set()
            assert self.opened.wait(30)
            publish(data, *parts)

        monkeypatch.setattr(store, "publish_bytes", slow)


def test_a_store_that_hangs_holds_nobody_up_and_gets_the_latest_when_it_is_back(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(store, monkeypatch)
    at = Progress(1, 2, 3, 4, 5.0, None)
    with Reporter(store, "a", lambda: at, period_s=0.0) as reporter:
        assert gate.reached.wait(30)
        for epochs in ([record(1)], [record(1), record(2)]):
            reporter.history([epoch.to_plain() for epoch in epochs])  # returns at once: the Store is still shut
        assert not store.exists("runs", "a", "history.json")
        at = dataclasses.replace(at, step=4)
        gate.opened.set()
    assert [found.epoch for found in read_history(store, "a")] == [1, 2]
    assert read_progress(store, "a") == at


def test_a_store_that_fails_is_told_of_once(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    Path(store.path()).mkdir(parents=True)
    Path(store.path("runs")).write_text("in the way")
    calls = []

    def progress() -> Progress:
        calls.append(1)
        if len(calls) == 5:
            enough.set()
        return Progress(1, 2, 3, 4, 5.0, None)

    enough = threading.Event()
    with Reporter(store, "a", progress, period_s=0.0) as reporter:
        reporter.history([record(1).to_plain()])
        assert enough.wait(30)
        reporter.history([record(1).to_plain(), record(2).to_plain()])
    told = [entry.getMessage() for entry in caplog.records]
    assert sorted(text.partition(":")[0] for text in told) == ["cannot write the history", "cannot write the progress"]
