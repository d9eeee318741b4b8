"""A training process that waits for its work: what it is before it knows its rank, and how it is started cold.

It imports what its work will need while the tasks are still finding each other. The work, and the variables that only
the meeting tells, come through its standard input; see :mod:`hvdspark.worker.rank` for the other side.
"""

from __future__ import annotations

import abc
import contextlib
import inspect
import json
import logging
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import IO

from hvdspark.launch import guard

logger = logging.getLogger(__name__)

BLOCK = struct.Struct(">Q")

# When the task asked for the process, by the machine's monotonic clock.
ASKED = "HVDSPARK_ASKED"

# So long it may take until a process that was killed is gone. One that waits within the kernel, for a file system or a
# device, heeds no signal before that answers.
END_TIMEOUT_S = 8.0

# Of a guard that was killed itself nobody knows what it looked after. What is left holds the output open.
_ORPHANS = "a process that outlived its guard"

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

    Parameters
    ----------
    lifeline
        A socket whose other end the guard has, or will have.

    Attributes
    ----------
    answers
        The descriptor through which it answers.
    left
        What of it could not be ended, for people; empty where all of it is gone.
    """

    answers: int
    left: str = ""

    _guard_pid: int

    def __init__(self, lifeline: socket.socket) -> None:
        self._lifeline = lifeline
        self._ending: guard.Ending | None = None
        self._is_all_gone = False
        self._has_ended = False
        their_input, our_input = os.pipe()
        our_output, their_output = os.pipe()
        self.answers, their_answers = os.pipe()
        self._input = open(our_input, "wb")  # noqa: PTH123, SIM115 - a descriptor, closed by end()
        self._output = open(our_output, "rb")  # noqa: PTH123, SIM115
        self._reader: threading.Thread | None = None
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

    def wait(self, timeout_s: float | None = None) -> int | None:
        """Wait for its end; returns its exit code, or minus the signal that ended it, or ``None`` in the meantime."""
        if self._ending is None:
            said = self._receive(guard.REPORT_BYTES, timeout_s)
            if said is not None:
                self._ending = guard.Ending.from_bytes(said)
                self._is_all_gone = len(said) == guard.REPORT_BYTES
        return None if self._ending is None else os.waitstatus_to_exitcode(self._ending.status)

    @property
    def peak_bytes(self) -> int:
        """The most memory that it had resident, once it has ended; 0 where nobody knows."""
        return 0 if self._ending is None else self._ending.peak_bytes

    def show_stacks(self) -> None:
        """Have it write the stacks of its threads, see :func:`hvdspark.worker.rank.serve`; also one that is stopped."""
        self._tell_guard(guard.SHOW_STACKS)
        self._wake_guard()

    def own(self, folder: str) -> None:
        """Have the guard remove a folder when all is gone, should this task not be there to do it."""
        self._tell_guard(guard.FOLDER + os.fsencode(folder))

    def _tell_guard(self, message: bytes) -> None:
        with contextlib.suppress(OSError):
            self._lifeline.sendall(message + guard.END)

    def _receive(self, count: int, timeout_s: float | None) -> bytes | None:
        """Receive what the guard says; nothing when it is gone, ``None`` when it says nothing in time."""
        readable, _, _ = select.select([self._lifeline], [], [], timeout_s)
        if not readable:
            return None
        try:
            return self._lifeline.recv(count, socket.MSG_WAITALL)
        except OSError:
            return b""

    def _wake_guard(self) -> None:
        """Have a guard go on that was stopped: it is in one process group with its process."""
        if self.wait(0) is None:
            with contextlib.suppress(OSError):
                os.kill(self._guard_pid, signal.SIGCONT)

    def _let_go(self) -> None:
        """Have the guard end it with all that it started, and wait until all of it is gone."""
        with contextlib.suppress(OSError):
            self._lifeline.shutdown(socket.SHUT_WR)
        self._wake_guard()
        self.wait()

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

    def read_output(self, read: Callable[[IO[bytes]], None]) -> None:
        """Have a thread read what it prints, which goes on after its end until all of it is read."""
        self._reader = threading.Thread(target=self._read, args=(read,), daemon=True)
        self._reader.start()

    def _read(self, read: Callable[[IO[bytes]], None]) -> None:
        with self._output:
            read(self._output)

    def end(self) -> None:
        """End the process and all that it started, and close what led to it; does nothing the second time.

        What it printed is read to the end. What the system does not end is not waited for, nor what was left by a guard
        that was killed itself: ``left`` tells what that is.
        """
        if self._has_ended:
            return
        self._has_ended = True
        # What is left may hold its ends of the pipes, and closing ours can wait for that as well.
        farewell = threading.Thread(target=self._take_leave, daemon=True)
        farewell.start()
        farewell.join(END_TIMEOUT_S)
        if farewell.is_alive():
            self.left = self._find_left()
            logger.warning("%s cannot be killed; its guard waits for its end", self.left)
        if self._reader is None:
            self._output.close()
        elif not self.left:
            self._reader.join(None if self._is_all_gone else END_TIMEOUT_S)
            if self._reader.is_alive():
                self.left = _ORPHANS

    def _find_left(self) -> str:
        """Name the processes that are there although they were killed."""
        if self._ending is not None:
            return _ORPHANS
        alive = guard.descendants(self._guard_pid) or [self._guard_pid]
        return " and ".join(f"process {pid} (state {_state(pid)})" for pid in alive)

    def _take_leave(self) -> None:
        self._let_go()
        if self._feeder is not None:
            self._feeder.join()
        for stream in (self._input, self._lifeline):
            with contextlib.suppress(OSError):
                stream.close()
        os.close(self.answers)


class ColdProcess(TrainingProcess):
    """A process of its own: ``python -m hvdspark.worker`` under a guard on a bare interpreter."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        lifeline, self._guards_end = socket.socketpair()
        super().__init__(lifeline)

    def _start(self, stdin: int, output: int, answers: int) -> None:
        worker = [sys.executable, "-m", "hvdspark.worker", str(answers), *self._recipe.modules]
        with self._guards_end as guards_end:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", *script_of(guard), str(guards_end.fileno()), *worker],
                stdin=stdin,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._recipe.environment,
                pass_fds=[guards_end.fileno(), answers],
                start_new_session=True,
            )
        self._guard_pid = self._process.pid

    def is_there(self, timeout_s: float) -> bool:  # noqa: ARG002
        """Say yes: it was started by this process."""
        return True

    def _let_go(self) -> None:
        super()._let_go()
        self._process.wait()


def _state(pid: int) -> str:
    """Return the letter by which the system tells what a process is doing."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "unknown"


def script_of(module: ModuleType) -> list[str]:
    """Return the arguments by which an interpreter runs a module as a script; they stand before the script's own."""
    path = module.__file__
    if path is not None and Path(path).is_file():
        return [path]
    # What came with --py-files is imported from the zip, where no script is.
    return ["-c", inspect.getsource(module)]
