"""Seconds from fit() to the first step, beside the bare import of the framework."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import data, program
from benchmarks.comparison import Comparison, interleaved, seconds

ROWS = 20_000
IMPORT = [sys.executable, "-c", "import tensorflow, horovod.tensorflow"]
COLD_TARGET = 1 / 1.5
WARM_LIMIT_S = 1.5


def measure(*, quick: bool) -> Iterator[Comparison]:
    """Fit twice in new sessions, the rows already in the Store from an earlier one."""
    warm = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = data.write_labelled(folder / "rows", ROWS)
        numbers = itertools.count()

        def first_step() -> float:
            results = folder / f"session-{next(numbers)}"
            program.run("startup_session", rows, folder / "store", results)
            first, second = json.loads(results.read_text())
            warm.append(second)
            return float(first)

        def bare_import() -> float:
            return seconds(lambda: subprocess.run(IMPORT, check=True, stdin=subprocess.DEVNULL))

        first_step(), bare_import()
        warm.clear()
        cold, bare = interleaved(1 if quick else 3, first_step, bare_import)
    note = "the target is 1.5 times as long; the rows are in the Store, and Spark's session is up"
    yield Comparison("start-up, first fit vs bare import", "s", cold, bare, COLD_TARGET, note)
    note = f"against the limit of {WARM_LIMIT_S:g} s"
    yield Comparison("start-up, second fit vs its limit", "s", warm, [WARM_LIMIT_S], 1.0, note)
