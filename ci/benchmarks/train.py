"""Samples per second of the training step, beside a bare script of two processes and beside one rank."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import data
from benchmarks.comparison import Comparison, SkippedError, interleaved
from benchmarks.estimator import make_estimator
from benchmarks.session import CLUSTER, spark_session
from hvdspark.launch.control import CONTROLLERS

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

BARE_TARGET = 0.95
ONE_RANK_TARGET = 1.3
# The most of its time, in per cent, that a rank may wait for data.
WAITING_LIMIT = 5.0
NAMES = {"gloo": "Gloo", "mpi": "MPI"}
LAUNCHERS = {
    "gloo": [sys.executable, "-m", "horovod.runner.launch", "-np", "2", "--gloo"],
    "mpi": [str(Path(sys.executable).with_name("mpiexec")), "-n", "2"],
}
MPI_VARIABLES = {"HOROVOD_CONTROLLER": "mpi", "HOROVOD_CPU_OPERATIONS": "mpi"}


def measure(*, quick: bool, controller: str) -> Iterator[Comparison]:
    """Train the MLP on two ranks, by the bare script and on one rank, in turns."""
    if controller not in CONTROLLERS:
        raise SkippedError(f"this version has no controller '{controller}'")
    rows, epochs, repeats = (60_000, 3, 1) if quick else (200_000, 6, 3)
    waiting: list[float] = []
    with tempfile.TemporaryDirectory() as name, spark_session(CLUSTER) as spark:
        folder = Path(name)
        df = spark.read.parquet(str(data.write_labelled(folder / "rows", rows)))
        ours, bare, alone = interleaved(
            repeats,
            partial(_fit, df, folder, epochs, controller, 2, waiting),
            partial(_run_bare, folder, rows, epochs, controller),
            partial(_fit, df, folder, epochs, controller, 1, []),
        )
    title = f"train, 2 ranks over {NAMES[controller]}"
    yield Comparison(f"{title} vs bare script of 2 processes", "samples/s", ours, bare, BARE_TARGET)
    yield Comparison(f"{title} vs 1 rank", "samples/s", ours, alone, ONE_RANK_TARGET)
    if waiting:
        note = f"against the limit of {WAITING_LIMIT:g} %"
        yield Comparison(f"{title}, share of time waiting vs its limit", "%", waiting, [WAITING_LIMIT], 1.0, note)


def _fit(df: DataFrame, folder: Path, epochs: int, controller: str, ranks: int, waiting: list[float]) -> float:
    """Train with the estimator; returns samples per second without the first epoch, and notes the waiting."""
    estimator = make_estimator(folder / "store", num_proc=ranks, epochs=epochs, controller=controller)
    model: Any = estimator.fit(df)
    share = getattr(model, "data_wait_share", None)
    if share is not None:
        waiting.append(100 * share)
    return float(model.rows_per_s)


def _run_bare(folder: Path, rows: int, epochs: int, controller: str) -> float:
    result = folder / "bare"
    program = [sys.executable, "-m", "benchmarks.bare_training", str(rows), str(epochs), str(result)]
    variables = {**os.environ, **(MPI_VARIABLES if controller == "mpi" else {})}
    subprocess.run([*LAUNCHERS[controller], *program], env=variables, stdin=subprocess.DEVNULL, check=True)
    return float(result.read_text())
