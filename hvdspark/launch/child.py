"""One training process per barrier task: start it, listen to it, and never leave it behind.

The process is ``python -m hvdspark.worker``, under a guard (:mod:`hvdspark.launch.guard`) that holds one end of a
lifeline: when this side dies, for whatever reason, the guard sees the end of it and ends the process with all that it
started. The work comes through standard input, the answers come back through a pipe of their own as frames; what the
process prints goes to its log, and the last lines are kept for errors.
"""

from __future__ import annotations

import collections
import contextlib
import logging
import os
import re
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import IO, Any, Literal

from hvdspark.launch import guard
from hvdspark.plan import RankContext

logger = logging.getLogger(__name__)

FRAME = struct.Struct(">cQ")
RESULT_FD = "HVDSPARK_RESULT_FD"
READY, DONE, FAILED = b"R", b"D", b"F"

TAIL_LINES = 50

# What TensorFlow prints whenever it starts, whatever its log level; the last lines of an error have better to say.
_NOISE = re.compile(r"absl::InitializeLog|oneDNN custom operations are on")

FailureKind = Literal["user", "peer", "died", "meet", "start", "late"]


@dataclass(frozen=True)
class Failure:
    """Why a rank did not finish.

    Parameters
    ----------
    rank, host
        Which one, and where.
    kind
        ``"user"``: an exception in what the rank ran; ``"peer"``: it noticed that another rank was gone; ``"died"``:
        the process ended by a signal or exit; ``"meet"``: the tasks did not find each other; ``"start"``: the process
        ended before it began its work; ``"late"``: it did not begin in time.
    error
        Type and message of the exception, or what happened to the process.
    details
        The traceback, where there is one.
    log_tail
        The last lines the rank wrote.
    time
        When it happened, in seconds since the epoch by that host's clock.
    """

    rank: int
    host: str
    kind: FailureKind
    error: str
    details: str = ""
    log_tail: str = ""
    time: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary of plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Outcome:
    """How a rank ended: its result's bytes, or its failure."""

    result: bytes | None = None
    failure: Failure | None = None


def run_child(
    payload: bytes,
    context: RankContext,
    environment: Mapping[str, str],
    log: IO[bytes] | None,
    start_timeout_s: float,
) -> Outcome:
    """Run a training process to its end.

    Parameters
    ----------
    payload
        The pickled work, see :mod:`hvdspark.worker`.
    context
        The rank's place.
    environment
        Variables to add to this process's own.
    log
        Where its output goes, besides the tail that is kept.
    start_timeout_s
        Seconds until it must have begun its work.
    """
    tail: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
    with _process(environment, context, log, tail) as (process, answers):
        _hand_over(process, payload)
        frames = _Frames(answers, process, time.monotonic() + start_timeout_s)
        answer = frames.final()
        ended = time.time()
        if not frames.timed_out:
            # After its last answer the process has a moment to end on its own.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
    if answer is not None and answer[0] == DONE:
        return Outcome(result=answer[1])
    kind: Any
    if answer is not None:
        kind, error, details = answer[1].decode(errors="replace").split("\0", 2)
    else:
        kind = "died" if frames.ready else "late" if frames.timed_out else "start"
        error, details = _describe_end(process.returncode, frames, start_timeout_s), ""
    if log is not None:
        _write_lines(log, context, [error, *details.splitlines()])
    return Outcome(failure=Failure(context.rank, context.host, kind, error, details, "\n".join(tail), ended))


@contextlib.contextmanager
def _process(
    environment: Mapping[str, str], context: RankContext, log: IO[bytes] | None, tail: collections.deque[str]
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Start the process under its guard; both, and all that the process started, are gone when the block ends."""
    lifeline_end, lifeline = os.pipe()
    answers, answers_end = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", guard.__file__, str(lifeline_end), sys.executable, "-m", "hvdspark.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**_environment(), **environment, RESULT_FD: str(answers_end)},
        pass_fds=[lifeline_end, answers_end],
        start_new_session=True,
    )
    os.close(lifeline_end)
    os.close(answers_end)
    assert process.stdout is not None
    pump = threading.Thread(target=_pump, args=(process.stdout, context, log, tail), daemon=True)
    pump.start()
    try:
        yield process, answers
    finally:
        # Closing the lifeline makes the guard kill what is left; it returns when all of it is gone.
        os.close(lifeline)
        process.wait()
        pump.join()
        os.close(answers)
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


def _environment() -> dict[str, str]:
    """Return this process's variables, with the imports that Spark arranged for it."""
    # What Spark put on this interpreter's path (--py-files, addPyFile) must be importable there too.
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def _hand_over(process: subprocess.Popen[bytes], payload: bytes) -> None:
    """Send the work. A process that is gone already shows by its missing answer."""
    assert process.stdin is not None
    with contextlib.suppress(OSError):
        process.stdin.write(struct.pack(">Q", len(payload)) + payload)
        process.stdin.close()


class _Frames:
    """The answers of a process, as they arrive."""

    def __init__(self, descriptor: int, process: subprocess.Popen[bytes], deadline: float) -> None:
        self._descriptor = descriptor
        self._process = process
        self._deadline = deadline
        self._buffer = b""
        self.ready = False
        self.timed_out = False

    def final(self) -> tuple[bytes, bytes] | None:
        """Wait for the last answer; ``None`` when the process ended, or did not begin in time, without one."""
        while True:
            frame = self._frame()
            if frame is None or frame[0] != READY:
                return frame
            self.ready = True

    def _frame(self) -> tuple[bytes, bytes] | None:
        while True:
            if len(self._buffer) >= FRAME.size:
                status, length = FRAME.unpack_from(self._buffer)
                end = FRAME.size + length
                if len(self._buffer) >= end:
                    body, self._buffer = self._buffer[FRAME.size : end], self._buffer[end:]
                    return status, body
            left = None if self.ready else self._deadline - time.monotonic()
            if left is not None and left <= 0:
                self.timed_out = True
                return None
            # Woken now and then, because a grandchild may hold the pipe open after the process is gone.
            readable, _, _ = select.select([self._descriptor], [], [], 1.0 if left is None else min(left, 1.0))
            if readable:
                chunk = os.read(self._descriptor, 1 << 20)
                if not chunk:
                    return None
                self._buffer += chunk
            elif self._process.poll() is not None:
                return None


def _describe_end(code: int | None, frames: _Frames, start_timeout_s: float) -> str:
    if frames.timed_out:
        return (
            f"the training process did not begin within {start_timeout_s:g} s; a slow disk or a busy host can be the"
            " cause: raise start_timeout"
        )
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = " (the system's out-of-memory killer sends this)" if -code == signal.SIGKILL else ""
        return f"the training process was killed by {name}{hint}"
    return f"the training process ended with exit code {code} before it gave a result"


def _pump(stream: IO[bytes], context: RankContext, log: IO[bytes] | None, tail: collections.deque[str]) -> None:
    """Copy the process's output line by line to its log, each line with the rank before it."""
    for line in stream:
        text = line.decode(errors="replace").rstrip("\n")
        if not _NOISE.search(text):
            tail.append(text)
        if log is not None and not _write_lines(log, context, [text]):
            log = None


def _write_lines(log: IO[bytes], context: RankContext, lines: Iterable[str]) -> bool:
    """Write lines to the log, each with the rank before it; ``False`` when the log cannot be written."""
    try:
        log.writelines(f"[{context}] {line}\n".encode() for line in lines)
        log.flush()
    except (OSError, ValueError) as exc:
        logger.warning("[%s] cannot write the log: %s", context, exc)
        return False
    return True
