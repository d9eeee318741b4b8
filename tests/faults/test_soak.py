"""Many fits in one session, some of which lose a rank, a task or an executor: all succeed, and nothing piles up."""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import pytest
from clusters import own_processes
from faulty_fits import (
    Fault,
    Trained,
    assert_same,
    die,
    estimator,
    kill_executor,
    kill_python_workers,
    log_of,
    outcome,
    stop,
)
from pyspark.sql import DataFrame, SparkSession

from hvdspark import Store
from hvdspark.runs import read_record

FITS = 50
EPOCHS, STEPS = 2, 9
# What is held is counted after these.
WARM_UP = 10

# Warm parents take turns with others when their executor or its environment changes.
MOST_POOL_PROCESSES = 4


def leave() -> None:
    os._exit(3)


FAULTS: dict[str, Callable[[], None]] = {
    "the rank is killed": die,
    "the rank is stopped": stop,
    "the rank leaves": leave,
    "its Python worker is killed": kill_python_workers,
    "its executor is killed": kill_executor,
}


def held(scratch: Path, before: Mapping[str, int] = MappingProxyType({})) -> dict[str, int]:
    """Count what a driver or its executors could leak, when what has just ended is gone, and no more than before."""
    gc.collect()  # Py4J's connections end with their threads' objects
    own = psutil.Process()
    deadline = time.monotonic() + 20
    while True:
        found = {
            "descriptors": own.num_fds(),
            "threads": own.num_threads(),
            "listening": sum(c.status == psutil.CONN_LISTEN for c in own.net_connections()),
            "ranks": sum(p.name() in ("hvdspark-rank", "hvdspark-guard") for p, _ in own_processes()),
            "folders": len(list(scratch.iterdir())),
        }
        is_over = found["ranks"] == found["folders"] == 0 and all(found[name] <= before[name] for name in before)
        if is_over or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


Place = tuple[int, int, int]


def schedule() -> dict[int, tuple[str, Place]]:
    """Say which fits are struck, by what, and where: at a rank, an epoch and a step. Each fault happens twice."""
    chance = random.Random(11)
    numbers = sorted(chance.sample(range(WARM_UP, FITS), 2 * len(FAULTS)))
    kinds = chance.sample([*FAULTS] * 2, len(numbers))
    # Of the two of a kind one is on either rank.
    seen: dict[str, int] = dict.fromkeys(FAULTS, 0)
    strikes = {}
    for number, kind in zip(numbers, kinds, strict=True):
        strikes[number] = kind, (seen[kind], chance.randrange(EPOCHS), chance.randrange(STEPS))
        seen[kind] += 1
    return strikes


@pytest.mark.timeout(900)
def test_fifty_fits_with_faults_have_the_weights_of_those_without_and_leave_nothing(
    spark: SparkSession, df: DataFrame, store: Store, tmp_path: Path
) -> None:
    df.write.parquet(str(tmp_path / "rows"))
    rows = spark.read.parquet(str(tmp_path / "rows"))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    strikes = schedule()
    struck = [f"fit-{number:02d}" for number in strikes]
    before, memory_before = {}, 0
    expected: Trained | None = None
    for number in range(FITS):
        kind, place = strikes.get(number, (None, (0, 0, 0)))
        name = f"fit-{number:02d}"
        callbacks = []
        settings: dict[str, Any] = {"epochs": EPOCHS, "run_id": name, "backend_env": {"TMPDIR": str(scratch)}}
        if kind is not None:
            callbacks.append(Fault(tmp_path / name, *place, FAULTS[kind]))
        if kind == "the rank is stopped":
            settings["stall_timeout_s"] = 5
        found = outcome(estimator(store, *callbacks, **settings).fit(rows))
        if kind == "the rank is stopped":
            assert "in stop\n" in log_of(store, name, place[0])
        expected = expected or found
        assert_same(found, expected)
        losses = found[0]["loss"]
        assert len(losses) == EPOCHS
        assert losses[-1] < losses[0]
        if number == WARM_UP - 1:
            before, memory_before = held(scratch), psutil.Process().memory_info().rss
    assert all((tmp_path / name).exists() for name in struck), "a fault did not happen"

    after = held(scratch, before)
    assert after["ranks"] == after["folders"] == 0
    for name, count in before.items():
        assert after[name] <= count, (name, before, after)
    assert psutil.Process().memory_info().rss < memory_before + (32 << 20)
    assert sum("hvdspark.worker.warm" in command for _, command in own_processes()) <= MOST_POOL_PROCESSES

    assert store.list("runs") == [f"fit-{number:02d}" for number in range(FITS)]
    for name in store.list("runs"):
        files = ["checkpoints", "history.json", "logs", "model.keras", "progress.json", "run.json"]
        assert store.list("runs", name) == files
        assert store.list("runs", name, "checkpoints") == []
        record = read_record(store, name)
        assert record is not None
        assert record.state == "finished"
        attempts = [entry for entry in store.list("runs", name, "logs") if entry.startswith("attempt-")]
        assert bool(attempts) == (name in struck)
    # One dataset for all, and no lease on it.
    (dataset,) = store.list("datasets")
    assert "leases" not in store.list("datasets", dataset)
