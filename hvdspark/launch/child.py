"""One training process per barrier task: start it, listen to it, and never leave it behind.

The process is forked from a warm parent (:mod:`hvdspark.launch.pool`) or started cold
(:mod:`hvdspark.launch.process`), before the task knows its peers. Either way it is under a guard
(:mod:`hvdspark.launch.guard`) that holds one end of a lifeline: when this side dies, for whatever reason, the guard
sees the end of it and ends the process with all that it started. The work comes through standard input, the answers
come back through a pipe of their own as frames; what the process prints goes to its log, and the last lines are kept
for errors.
"""

from __future__ import annotations

import collections
import logging
import os
import re
import select
import signal
import struct
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import IO, Any, Literal

from hvdspark.launch import pool
from hvdspark.launch.alarm import Alarm
from hvdspark.launch.process import ColdProcess, Recipe, TrainingProcess
from hvdspark.plan import RankContext

logger = logging.getLogger(__name__)

FRAME = struct.Struct(">cQ")
READY, DONE, FAILED = b"R", b"D", b"F"

TAIL_LINES = 50

# When the alarm rings, a rank has this long to say what it knows of it: it may be the one that failed first.
ALARM_GRACE_S = 1.0

# What TensorFlow prints whenever it starts, whatever its log level; the last lines of an error have better to say.
_NOISE = re.compile(r"absl::InitializeLog|oneDNN custom operations are on")

FailureKind = Literal["user", "peer", "died", "meet", "start", "late", "data"]


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
        ended before it began its work; ``"late"``: it did not begin in time; ``"data"``: the rows that came with the
        tasks cannot be trained on.
    error
        Type and message of the exception, or what happened to the process; for ``"data"`` the exception as JSON.
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


class Child:
    """A training process that was started ahead of its work; a context manager, after which all of it is gone.

    Parameters
    ----------
    recipe
        What it is to be before it has work.
    warm
        Whether to take it from the warm pool.
    """

    def __init__(self, recipe: Recipe, *, warm: bool) -> None:
        self._recipe = recipe
        # Where there is nothing to import, there is nothing to keep either.
        pooled = pool.take(recipe) if warm and recipe.modules else None
        self._process: TrainingProcess = pooled or ColdProcess(recipe)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.end()

    def run(
        self,
        payload: bytes,
        context: RankContext,
        environment: Mapping[str, str],
        log: IO[bytes] | None,
        start_timeout_s: float,
        own: bytes = b"",
        alarm: Alarm | None = None,
    ) -> Outcome:
        """Give the process its work and wait for its end.

        Parameters
        ----------
        payload
            The pickled work, see :mod:`hvdspark.worker`.
        context
            The rank's place.
        environment
            Variables to add to the recipe's.
        log
            Where its output goes, besides the tail that is kept.
        start_timeout_s
            Seconds until it must have begun its work.
        own
            Arguments of this rank alone, as a pickled tuple; they come before those of the work.
        alarm
            Rung when the rank fails; when it rings, the rank is ended.
        """
        deadline = time.monotonic() + start_timeout_s
        process = self._confirmed(context, start_timeout_s / 2)
        tail: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
        pump = threading.Thread(target=_pump, args=(process.output, context, log, tail), daemon=True)
        pump.start()
        try:
            process.hand_over(environment, payload, own)
            frames = _Frames(process, deadline, alarm)
            answer = frames.final()
            ended = time.time()
            if alarm is not None and (answer is None or answer[0] != DONE):
                alarm.ring()
            if not frames.timed_out and not frames.stopped:
                # After its last answer the process has a moment to end on its own.
                process.wait(10)
        finally:
            process.end()
            pump.join()
            if alarm is not None:
                alarm.through()
        if answer is not None and answer[0] == DONE:
            return Outcome(result=answer[1])
        kind: Any
        if answer is not None:
            kind, error, details = answer[1].decode(errors="replace").split("\0", 2)
        else:
            kind, error, details = _describe_end(process.wait(), frames, start_timeout_s)
        if log is not None:
            _write_lines(log, context, [error, *details.splitlines()])
        return Outcome(failure=Failure(context.rank, context.host, kind, error, details, "\n".join(tail), ended))

    def _confirmed(self, context: RankContext, timeout_s: float) -> TrainingProcess:
        """Return a process that is certainly there: a pool that fails costs time, never the fit."""
        if not self._process.is_there(timeout_s):
            logger.warning("[%s] the warm pool gave no training process; starting a cold one", context)
            self._process.end()
            self._process = ColdProcess(self._recipe)
        return self._process


class _Frames:
    """The answers of a process, as they arrive."""

    def __init__(self, process: TrainingProcess, deadline: float, alarm: Alarm | None) -> None:
        self._descriptor = process.answers
        self._process = process
        self._deadline = deadline
        self._alarm = alarm
        self._rung_at: float | None = None
        self._buffer = b""
        self.ready = False
        self.timed_out = False
        self.stopped = False

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
            left = self._left()
            if left is not None and left <= 0:
                self.stopped = self._rung_at is not None
                self.timed_out = not self.stopped
                return None
            waited_for: list[Any] = [self._descriptor]
            if self._alarm is not None and self._rung_at is None:
                waited_for.append(self._alarm)
            # Woken now and then, because a grandchild may hold the pipe open after the process is gone.
            readable, _, _ = select.select(waited_for, [], [], 1.0 if left is None else min(left, 1.0))
            if self._alarm in readable:
                self._rung_at = time.monotonic()
            if self._descriptor in readable:
                chunk = os.read(self._descriptor, 1 << 20)
                if not chunk:
                    return None
                self._buffer += chunk
            elif not readable and self._process.wait(0) is not None:
                return None

    def _left(self) -> float | None:
        """Return the seconds after which the process is given up."""
        if self._rung_at is not None:
            return self._rung_at + ALARM_GRACE_S - time.monotonic()
        return None if self.ready else self._deadline - time.monotonic()


def _describe_end(code: int | None, frames: _Frames, start_timeout_s: float) -> tuple[FailureKind, str, str]:
    """Say what became of a process that gave no answer: kind, error, details."""
    if frames.stopped:
        return "peer", "stopped, because another rank had failed", ""
    if frames.timed_out:
        late = f"the training process did not begin within {start_timeout_s:g} s"
        return "late", f"{late}; a slow disk or a busy host can be the cause: raise start_timeout", ""
    kind: FailureKind = "died" if frames.ready else "start"
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = " (the system's out-of-memory killer sends this)" if -code == signal.SIGKILL else ""
        return kind, f"the training process was killed by {name}{hint}", ""
    return kind, f"the training process ended with exit code {code} before it gave a result", ""


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
