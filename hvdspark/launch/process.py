"""A training process that waits for its work: what it is before it knows its rank, and how it is started cold.

It imports what its work will need while the tasks are still finding each other. The work, and the variables that only
the meeting tells, come through its standard input; see :mod:`hvdspark.worker.rank` for the other side.
"""

from __future__ import annotations

import abc
import contextlib
import json
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import IO

from hvdspark.launch import guard

BLOCK = struct.Struct(">Q")

# As Spark made it. Later code in this interpreter may change it: TensorFlow does, where a transform has run before.
_ENVIRONMENT = dict(os.environ)


@dataclass(frozen=True)
class Recipe:
    """What a training process is before it has work.

    Parameters
    ----------
    environment
        All its environment variables, but for those of its rank.
    modules
        What it imports at once, because its work will need it.
    """

    environment: Mapping[str, str] = field(repr=False)
    modules: tuple[str, ...] = ()


def recipe_of(additions: Mapping[str, str], modules: tuple[str, ...] = ()) -> Recipe:
    """Make the recipe of a process like this one was when it began, with variables added and modules imported."""
    # What Spark put on this interpreter's path (--py-files, addPyFile) must be importable there too.
    path = os.pathsep.join(entry for entry in sys.path if entry)
    # The secret by which this interpreter talks to its JVM is nobody else's business.
    own = {name: value for name, value in _ENVIRONMENT.items() if not name.startswith("PYTHON_WORKER_FACTORY_")}
    return Recipe({**own, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **additions}, modules)


class TrainingProcess(abc.ABC):
    """A training process under its guard, seen from the task.

    Attributes
    ----------
    output
        What it prints.
    answers
        The descriptor through which it answers.
    """

    output: IO[bytes]
    answers: int

    def __init__(self) -> None:
        their_input, our_input = os.pipe()
        our_output, their_output = os.pipe()
        self.answers, their_answers = os.pipe()
        self._input = open(our_input, "wb")  # noqa: PTH123, SIM115 - a descriptor, closed by end()
        self.output = open(our_output, "rb")  # noqa: PTH123, SIM115
        self._feeder: threading.Thread | None = None
        try:
            self._start(their_input, their_output, their_answers)
        finally:
            for descriptor in (their_input, their_output, their_answers):
                os.close(descriptor)

    @abc.abstractmethod
    def _start(self, stdin: int, output: int, answers: int) -> None:
        """Start it with these descriptors."""

    @abc.abstractmethod
    def is_there(self, timeout_s: float) -> bool:
        """Wait until it certainly runs; ``False`` when it does not."""

    @abc.abstractmethod
    def wait(self, timeout_s: float | None = None) -> int | None:
        """Wait for its end; returns its exit code, or minus the signal that ended it, or ``None`` in the meantime."""

    @abc.abstractmethod
    def _let_go(self) -> None:
        """Have the guard end it with all that it started, and wait until all of it is gone."""

    def hand_over(self, environment: Mapping[str, str], payload: bytes, own: bytes = b"") -> None:
        """Send the variables of its rank, the work, and what of it is the rank's own; does not wait for any of it."""
        blocks = (json.dumps(dict(environment)).encode(), payload, own)
        # It may still be importing, and take nothing before it is through with that.
        self._feeder = threading.Thread(target=self._feed, args=(blocks,), daemon=True)
        self._feeder.start()

    def _feed(self, blocks: tuple[bytes, ...]) -> None:
        # A process that is gone already shows by its missing answer.
        with contextlib.suppress(OSError):
            for block in blocks:
                self._input.write(BLOCK.pack(len(block)))
                self._input.write(block)
            self._input.close()

    def end(self) -> None:
        """End the process and all that it started, and close what led to it; does nothing the second time."""
        if self._input.closed and self.output.closed:
            return
        self._let_go()
        if self._feeder is not None:
            self._feeder.join()
        for stream in (self._input, self.output):
            with contextlib.suppress(OSError):
                stream.close()
        os.close(self.answers)


class ColdProcess(TrainingProcess):
    """A process of its own: ``python -m hvdspark.worker`` under a guard on a bare interpreter."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        super().__init__()

    def _start(self, stdin: int, output: int, answers: int) -> None:
        lifeline_end, self._lifeline = os.pipe()
        worker = [sys.executable, "-m", "hvdspark.worker", str(answers), *self._recipe.modules]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", guard.__file__, str(lifeline_end), *worker],
                stdin=stdin,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._recipe.environment,
                pass_fds=[lifeline_end, answers],
                start_new_session=True,
            )
        finally:
            os.close(lifeline_end)

    def is_there(self, timeout_s: float) -> bool:  # noqa: ARG002
        """Say yes: it was started by this process."""
        return True

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Wait for the guard, which ends as the process ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(timeout_s)
        return None

    def _let_go(self) -> None:
        # Closing the lifeline makes the guard kill what is left; it returns when all of it is gone.
        os.close(self._lifeline)
        self._process.wait()
