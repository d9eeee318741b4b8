"""Seconds from a fault until the driver starts the ranks again, and until they train again."""

from __future__ import annotations

import logging
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import psutil

from benchmarks import data
from benchmarks.comparison import Comparison
from benchmarks.estimator import make_estimator
from benchmarks.session import CLUSTER, spark_session

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
        is_here = os.environ["HOROVOD_RANK"] == "1" and self._epoch == 1 and batch == 10
        if is_here and not Path(self._struck).exists():
            Path(self._struck).write_text(str(time.time()))
            self._act()
        if self._is_second_attempt() and not Path(self._again).exists():
            Path(self._again).write_text(str(time.time()))

    def _is_second_attempt(self) -> bool:
        # Not noted on the callback: what it knows is given back from the state.
        struck = Path(self._struck)
        return struck.exists() and psutil.Process().create_time() > float(struck.read_text() or "inf")

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
            noticed, again = ([times[place] for times in found] for place in (0, 1))
            allowed = LIMIT_S + (STALL_S if "stall" in fault else 0)
            note = f"against {allowed:g} s; they train again after {statistics.median(again):.1f} s"
            yield Comparison(f"{fault}: all ranks have ended", "s", noticed, [allowed], 1.0, note)


def _strike(
    spark: SparkSession, folder: Path, rows: Path, act: Callable[[], None], settings: dict[str, Any]
) -> tuple[float, float]:
    """Return the seconds until the driver decided to start again, and until a step was taken."""
    decided: list[float] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if "restart 1 of" in record.getMessage():
                decided.append(record.created)

    marks = Path(tempfile.mkdtemp(dir=folder))
    listener, source = Listener(), logging.getLogger("hvdspark.estimators.fitting")
    source.addHandler(listener)
    try:
        callbacks = [Strike(marks, act)]
        estimator = make_estimator(
            folder / "store", epochs=EPOCHS, callbacks=callbacks, stall_timeout_s=STALL_S, **settings
        )
        estimator.fit(spark.read.parquet(str(rows)))
    finally:
        source.removeHandler(listener)
    struck, again = (float((marks / name).read_text()) for name in ("struck", "again"))
    return decided[0] - struck, again - struck
