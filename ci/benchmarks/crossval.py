"""Seconds of a cross-validation from the warm pool, beside one whose every fit starts its ranks cold."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks import data, program
from benchmarks.comparison import Comparison, interleaved

ROWS = 20_000


def measure(*, quick: bool) -> Iterator[Comparison]:
    """Take turns, each time in a new session: two values of a parameter, two folds, and the fit of the best."""
    with tempfile.TemporaryDirectory() as name:
        rows = data.write_labelled(Path(name, "rows"), ROWS)
        warm, cold = (partial(_seconds, rows, flag) for flag in ("--warm-pool", "--no-warm-pool"))
        ours, theirs = interleaved(1 if quick else 3, warm, cold)
    yield Comparison("CrossValidator, 5 fits, new session, vs warm_pool=False", "s", ours, theirs)


def _seconds(rows: Path, flag: str) -> float:
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "seconds")
        program.run("crossval_session", rows, result, Path(folder, "store"), flag)
        return float(result.read_text())
