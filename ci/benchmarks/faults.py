"""Seconds from a fault until it is noticed, until all ranks have ended, and until they train again."""

from __future__ import annotations

import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import psutil

from benchmarks import data
from benchmarks.comparison import Comparison
from benchmarks.estimator import make_estimator
from benchmarks.session import CLUSTER, spark_session
from hvdspark import Store
from hvdspark.runs import read_record

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

ROWS = 50_000
EPOCHS = 3
LIMIT_S = 5.0
STALL_S = 5.0


class Strike(keras.callbacks.Callback):  # type: ignore[misc]
    """Has something happen to rank 1 in the second epoch, once, and notes when, and when training goes on."""

    def __init__(self, folder: Path, act: Callable[[], None]) -> None:
        super().__init__()
        self._struck, self._again, self._act = str(folder / "struck"), str(folder / "again"), act

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Strike, or note that a step was taken afterwards."""
        if os.environ["HOROVOD_RANK"] != "1":
            return
        struck, again = Path(self._struck), Path(self._again)
        if not struck.exists() and self._epoch == 1 and batch == 10:
            struck.write_text(f"{time.time()} {os.getpid()}")
            self._act()
        # By its process, not by a note on the callback: what that knows is given back from the state.
        elif struck.exists() and not again.exists() and struck.read_text().split()[1:] != [str(os.getpid())]:
            again.write_text(str(time.time()))

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ARG002
        """Count."""
        self._epoch = epoch


def kill_rank() -> None:
    """As the system does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop_rank() -> None:
    """As a debugger does."""
    os.kill(os.getpid(), signal.SIGSTOP)


def never_return() -> None:
    """As a lock that is never released."""
    while True:
        time.sleep(1)


def kill_above(mark: str) -> None:
    """Kill the nearest process above this one that has this in its command line."""
    next(p for p in psutil.Process().parents() if mark in " ".join(p.cmdline())).kill()
    time.sleep(600)


FAULTS: dict[str, tuple[Callable[[], None], dict[str, Any]]] = {
    "a rank is killed (Gloo)": (kill_rank, {}),
    "a rank is killed (MPI)": (kill_rank, {"controller": "mpi"}),
    "a Python worker is killed": (partial(kill_above, "pyspark.daemon"), {"warm_pool": False}),
    "an executor is killed": (partial(kill_above, "CoarseGrainedExecutorBackend"), {"warm_pool": False}),
    f"a rank is stopped, stall_timeout_s={STALL_S:g}": (stop_rank, {}),
    f"a callback never returns, stall_timeout_s={STALL_S:g}": (never_return, {}),
}


def measure(*, quick: bool) -> Iterator[Comparison]:
    """Let each fault happen several times."""
    with tempfile.TemporaryDirectory() as name, spark_session(CLUSTER) as spark:
        folder = Path(name)
        rows = data.write_labelled(folder / "rows", ROWS)
        make_estimator(folder / "store", epochs=1).fit(spark.read.parquet(str(rows)))
        for fault, (act, settings) in FAULTS.items():
            found = [_strike(spark, folder, rows, act, settings) for _ in range(1 if quick else 3)]
            noticed, again = (
                statistics.median(getattr(times, name) for times in found) for name in ("noticed", "again")
            )
            allowed = LIMIT_S + (STALL_S if "stall" in fault else 0)
            note = f"against {allowed:g} s; noticed after {noticed:.2f} s; they train again after {again:.1f} s"
            ended = [times.ended for times in found]
            yield Comparison(f"{fault}: all ranks have ended", "s", ended, [allowed], 1.0, note)


class Times(NamedTuple):
    """Seconds from a fault to what followed.

    Parameters
    ----------
    noticed
        Until a task knew of it; where that is gone as well, until the driver did, which is the end.
    ended
        Until the driver was through with the launch, and could start the ranks again.
    again
        Until rank 1 had taken a step again.
    """

    noticed: float
    ended: float
    again: float


def _strike(spark: SparkSession, folder: Path, rows: Path, act: Callable[[], None], settings: dict[str, Any]) -> Times:
    """Fit with a fault in it."""
    marks = Path(tempfile.mkdtemp(dir=folder))
    estimator = make_estimator(
        folder / "store",
        epochs=EPOCHS,
        callbacks=[Strike(marks, act)],
        stall_timeout_s=STALL_S,
        run_id=marks.name,
        **settings,
    )
    estimator.fit(spark.read.parquet(str(rows)))
    record = read_record(Store.create(folder / "store"), marks.name)
    assert record is not None
    first = record.attempts[0]
    assert first.ended is not None
    struck, again = (float((marks / name).read_text().split()[0]) for name in ("struck", "again"))
    return Times((first.noticed or first.ended) - struck, first.ended - struck, again - struck)
