"""What can be measured, and each case's run in a process of its own."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from build_cache import Cache

from benchmarks.comparison import Comparison, Row, SkippedError

TIMEOUT_S = 1800
LAST_LINES = 6


@dataclass(frozen=True)
class Case:
    """Something to measure; gives one row of the table, or several.

    Parameters
    ----------
    name
        Its name on the command line.
    summary
        What is compared.
    module
        Module with the function ``measure(quick, **options)``, which yields comparisons.
    options
        What to call it with.
    """

    name: str
    summary: str
    module: str
    options: dict[str, Any] = field(default_factory=dict)


CASES = (
    Case("read-array", "the shard reader, 40 floats in an array column", "benchmarks.read", {"kind": "array"}),
    Case("read-scalars", "the shard reader, 40 columns of a float", "benchmarks.read", {"kind": "scalars"}),
    Case("read-images", "the shard reader, images of 3,072 bytes", "benchmarks.read", {"kind": "images"}),
    Case("read-encoded-images", "a rank's passes over JPEG images of 224 x 224", "benchmarks.read_images"),
    Case("write-array", "writing the dataset, 40 floats in an array column", "benchmarks.write", {"kind": "array"}),
    Case("write-scalars", "writing the dataset, 40 columns of a float", "benchmarks.write", {"kind": "scalars"}),
    Case("train-gloo", "the training step over Gloo", "benchmarks.train", {"controller": "gloo"}),
    Case("train-mpi", "the training step over MPI", "benchmarks.train", {"controller": "mpi"}),
    Case("startup", "from fit() to the first step", "benchmarks.startup"),
    Case("fit", "whole fits, transform and memory, beside horovod.spark", "benchmarks.fit"),
    Case("crossval", "a cross-validation from the warm pool", "benchmarks.crossval"),
    Case("transform-mlp", "transform, an MLP", "benchmarks.transform", {"kind": "mlp"}),
    Case("transform-convnet", "transform, a convolutional network", "benchmarks.transform", {"kind": "convnet"}),
    Case("direct", "fit without Parquet in between", "benchmarks.direct"),
    Case("faults", "how soon a fit goes on after a fault", "benchmarks.faults"),
    Case("launch", "what a rank costs to start", "benchmarks.launch"),
)


def chosen(names: Sequence[str]) -> list[Case]:
    """Return the cases that have such a name, or one that begins with it (``read``); all without names.

    Raises
    ------
    ValueError
        When a name fits none.
    """
    for name in names:
        if not any(_fits(case, name) for case in CASES):
            raise ValueError(f"there is no case '{name}'; the cases are: {', '.join(case.name for case in CASES)}")
    return [case for case in CASES if not names or any(_fits(case, name) for name in names)]


def _fits(case: Case, name: str) -> bool:
    return case.name == name or case.name.startswith(f"{name}-")


def log_of(case: Case) -> Path:
    """Return where the output of a case's process goes."""
    folder = Cache.default().root / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{case.name}.log"


def run(case: Case, *, quick: bool, timeout_s: float = TIMEOUT_S) -> Iterator[Row]:
    """Measure a case in a process of its own and yield its rows as they come.

    A case that fails yields the rows it had, and one that says what went wrong.
    """
    with tempfile.TemporaryDirectory(prefix=f"hvdspark-bench-{case.name}-") as folder, log_of(case).open("w") as log:
        results = Path(folder, "results")
        results.touch()
        # Scratch files of everything that it starts go with the folder.
        described = json.dumps(dataclasses.asdict(case))
        command = [sys.executable, "-m", "benchmarks.cases", described, str(results), *(["--quick"] if quick else [])]
        error = _watched(command, {**os.environ, "TMPDIR": folder}, log, timeout_s)
        for line in results.read_text().splitlines():
            yield Row(**json.loads(line))
    if error:
        last = "\n".join(log_of(case).read_text(errors="replace").splitlines()[-LAST_LINES:])
        print(f"{case.name} {error}; its log {log_of(case)} ends with:\n{last}", file=sys.stderr, flush=True)
        yield Row(case.name, "failed", note=f"{error}: {last.rpartition(chr(10))[2][:200]}")


def _watched(command: Sequence[str], variables: dict[str, str], log: Any, timeout_s: float) -> str:
    """Run a process to its end, or to its group's when it takes too long; returns what went wrong."""
    with subprocess.Popen(
        command, env=variables, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    ) as process:
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return f"took more than {timeout_s:g} s"
        finally:
            # Also what it left behind, and everything when this process is interrupted.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return f"failed with exit code {code}" if code else ""


def main() -> None:
    """Measure one case in this process and write its rows, one JSON object per line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", type=lambda text: Case(**json.loads(text)))
    parser.add_argument("results", type=Path)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    case: Case = arguments.case
    measure = importlib.import_module(case.module).measure
    with arguments.results.open("a", buffering=1) as results:
        for row in _rows(measure(quick=arguments.quick, **case.options), case):
            results.write(json.dumps(dataclasses.asdict(row)) + "\n")


def _rows(comparisons: Iterator[Comparison], case: Case) -> Iterator[Row]:
    try:
        yield from map(Row.of, comparisons)
    except SkippedError as reason:
        yield Row(case.name, "skipped", note=str(reason))


if __name__ == "__main__":
    main()
