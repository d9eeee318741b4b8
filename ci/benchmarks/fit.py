"""Whole fits, transform and memory of hvdspark and of horovod.spark, in sessions of their own that take turns."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build_cache import Cache

from benchmarks import data, predecessor, program
from benchmarks.comparison import Comparison

ROWS = 200_000
# horovod.spark scores so few rows a second that as many would take it hours.
TRANSFORM_ROWS = 2_000_000
# How its fits compare: (epochs, place in the session) to the target.
TARGETS = {(1, "first"): 4.0, (1, "second"): 8.0, (3, "first"): None, (3, "second"): None}
TRANSFORM_TARGET = 500.0
PYTHON_WORKER = {"executor's Python worker": "pyspark.daemon"}


@dataclass(frozen=True)
class Contestant:
    """A program, the interpreter it runs on, the mark of its ranks' command lines, and how many rows it transforms."""

    module: str
    python: Path
    rank: str
    transform_rows: int


@dataclass(frozen=True)
class Session:
    """What came of one session: seconds by (epochs, place), rows transformed per second, peaks of memory in MB."""

    fits: dict[tuple[int, str], float]
    transform_rows_per_s: float | None
    memory_mb: dict[str, float]


def measure(*, quick: bool) -> Iterator[Comparison]:
    """Compare with horovod.spark's KerasEstimator: 200,000 rows of 28 floats, an MLP, batch 256, two ranks."""
    ours = Contestant("fit_hvdspark", program.HERE, "hvdspark.worker", ROWS if quick else TRANSFORM_ROWS)
    theirs = Contestant(
        "fit_horovod_spark",
        predecessor.obtain_python(Cache.default()),
        "horovod.spark.task",
        500 if quick else 4_000,
    )
    plans = [(1, 1)] if quick else [(1, 1), (3, 3)] * 2
    sessions: dict[str, list[Session]] = {ours.module: [], theirs.module: []}
    with tempfile.TemporaryDirectory() as folder:
        rows = data.write_labelled(Path(folder, "rows"), ROWS)
        for plan in plans:
            for contestant in (ours, theirs):
                sessions[contestant.module].append(_run(contestant, rows, plan))
    return _comparisons(sessions[ours.module], sessions[theirs.module], (ours.transform_rows, theirs.transform_rows))


def _run(contestant: Contestant, rows: Path, plan: tuple[int, ...]) -> Session:
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.json")
        is_first_plan = plan[0] == 1
        arguments: list[Any] = [rows, results, Path(folder, "store"), "--epochs", *plan]
        arguments += ["--transform-rows", contestant.transform_rows if is_first_plan else 0]
        marks = {"rank": contestant.rank, **PYTHON_WORKER}
        memory_mb = program.run(contestant.module, *arguments, python=contestant.python, marks=marks)
        found = json.loads(results.read_text())
    fits = {(fit["epochs"], "second" if place else "first"): fit["seconds"] for place, fit in enumerate(found["fits"])}
    return Session(fits, found["transform_rows_per_s"], memory_mb)


def _comparisons(ours: list[Session], theirs: list[Session], transformed: tuple[int, int]) -> Iterator[Comparison]:
    for (epochs, place), target in TARGETS.items():
        taken = [[s.fits[epochs, place] for s in found if (epochs, place) in s.fits] for found in (ours, theirs)]
        if taken[0]:
            name = f"fit, {epochs} epoch{'s' * (epochs > 1)}, {place} of a session vs horovod.spark"
            yield Comparison(name, "s", taken[0], taken[1], target)
    rates = [[s.transform_rows_per_s for s in found if s.transform_rows_per_s] for found in (ours, theirs)]
    note = (
        f"the whole job, first of its session: {transformed[0]:,} rows of ours, {transformed[1]:,} of horovod.spark's"
    )
    yield Comparison("transform vs horovod.spark", "rows/s", rates[0], rates[1], TRANSFORM_TARGET, note)
    for role in ("driver", "rank", *PYTHON_WORKER):
        # Only some sessions transform, which is what fills a Python worker.
        peaks = [
            [s.memory_mb[role] for s in found if role not in PYTHON_WORKER or s.transform_rows_per_s]
            for found in (ours, theirs)
        ]
        yield Comparison(f"peak memory, {role} vs horovod.spark", "MB", peaks[0], peaks[1])
