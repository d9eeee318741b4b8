"""Many fits in one session, some of which lose a rank, a task or an executor: all succeed, and nothing piles up."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from clusters import own_processes
from faulty_fits import Fault, die, estimator, kill_executor, kill_python_workers
from pyspark.sql import DataFrame, SparkSession

from hvdspark import Store
from hvdspark.runs import read_record

FITS = 50
EPOCHS = 2
WARM_UP = 10

# Warm parents take turns with others when their executor or its environment changes.
MOST_POOL_PROCESSES = 4


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def leave() -> None:
    os._exit(3)


FAULTS: dict[str, Callable[[], None]] = {
    "the rank is killed": die,
    "the rank is stopped": stop,
    "the rank leaves": leave,
    "its Python worker is killed": kill_python_workers,
    "its executor is killed": kill_executor,
}


def held(scratch: Path) -> dict[str, int]:
    """Count what a driver or its executors could leak, when what has just ended is gone."""
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
        if found["ranks"] == found["folders"] == 0 or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def test_fifty_fits_with_faults_leave_nothing(spark: SparkSession, df: DataFrame, store: Store, tmp_path: Path) -> None:
    df.write.parquet(str(tmp_path / "rows"))
    rows = spark.read.parquet(str(tmp_path / "rows"))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    schedule = random.Random(11)
    struck, kinds, before, memory_before = [], set(), {}, 0
    for number in range(FITS):
        name = f"fit-{number:02d}"
        callbacks = []
        settings = {"epochs": EPOCHS, "run_id": name, "stall_timeout_s": 5, "backend_env": {"TMPDIR": str(scratch)}}
        if schedule.random() < 0.25:
            kind = schedule.choice(sorted(FAULTS))
            place = schedule.randrange(2), schedule.randrange(EPOCHS), schedule.randrange(9)
            callbacks.append(Fault(tmp_path / name, *place, FAULTS[kind]))
            struck.append(name)
            kinds.add(kind)
        model = estimator(store, *callbacks, **settings).fit(rows)
        losses = model.getHistory()["loss"]
        assert len(losses) == EPOCHS
        assert losses[-1] < losses[0]
        if number == WARM_UP - 1:
            before, memory_before = held(scratch), psutil.Process().memory_info().rss
    assert len(struck) >= FITS // 6
    assert kinds == FAULTS.keys()
    assert all((tmp_path / name).exists() for name in struck), "a fault did not happen"

    after = held(scratch)
    assert after["ranks"] == after["folders"] == 0
    for name, count in before.items():
        assert after[name] <= count + 3, (name, before, after)
    assert psutil.Process().memory_info().rss < memory_before + (64 << 20)
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
