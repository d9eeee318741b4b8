"""Programs that a case starts: Spark sessions that must be new, other interpreters, bare scripts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from benchmarks.memory import PeakMemory

HERE = Path(sys.executable)
NO_MARKS: Mapping[str, str] = {}


def run(module: str, *arguments: object, python: Path = HERE, marks: Mapping[str, str] = NO_MARKS) -> dict[str, float]:
    """Run a module of this package as a program.

    Parameters
    ----------
    module
        Its name.
    arguments
        Its arguments.
    python
        The interpreter; Spark's Python workers run on it too.
    marks
        What to tell processes by, whose memory is of interest; see :class:`PeakMemory`.

    Returns
    -------
    dict of str to float
        Peaks of memory in MB by role.

    Raises
    ------
    subprocess.CalledProcessError
        When it fails; its output is in the log of the case.
    """
    command = [str(python), "-m", f"benchmarks.{module}", *map(str, arguments)]
    with (
        subprocess.Popen(command, env=environment(python), stdin=subprocess.DEVNULL) as process,
        PeakMemory(process.pid, marks) as memory,
    ):
        code = process.wait()
    if code:
        raise subprocess.CalledProcessError(code, command)
    return memory.peaks_mb


def environment(python: Path) -> dict[str, str]:
    """Return the variables under which a program runs on an interpreter, and Spark's Python workers with it."""
    path = os.pathsep.join((str(python.parent), os.environ["PATH"]))
    return {**os.environ, "PATH": path, "PYSPARK_PYTHON": str(python), "PYSPARK_DRIVER_PYTHON": str(python)}
