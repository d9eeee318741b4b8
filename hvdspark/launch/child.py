"""One training process per barrier task: start it, listen to it, and never leave it behind.

The process is forked from a warm parent (:mod:`hvdspark.launch.pool`) or started cold
(:mod:`hvdspark.launch.process`), before the task knows its peers. Either way it is under a guard
(:mod:`hvdspark.launch.guard`) that holds one end of a lifeline: when this side dies, for whatever reason, the guard
sees the end of it and ends the process with all that it started. The work comes through standard input, the answers
come back through a pipe of their own as frames; what the process prints goes to its log, and the last lines are kept
for errors.
"""

from __future__ import annotations

import codecs
import collections
import contextlib
import logging
import re
import signal
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from hvdspark.launch import pool
from hvdspark.launch.alarm import Alarm
from hvdspark.launch.answers import DONE, Answers
from hvdspark.launch.failures import Failure, FailureKind, Outcome
from hvdspark.launch.guard import STACKS
from hvdspark.launch.memory import kills_for_memory, show_bytes
from hvdspark.launch.process import ASKED, ColdProcess, Recipe, TrainingProcess
from hvdspark.plan import RankContext

logger = logging.getLogger(__name__)

TAIL_LINES, _TAIL_LINE_CHARS = 50, 2000

# A line that is longer is read in pieces.
_PIECE_BYTES = 1 << 16

_STACKS_TIMEOUT_S, _STACKS_POLL_S = 2.0, 0.05

# After its last answer a process has a moment to end on its own: to let go of MPI, or only to exit.
_FINISH_S, _EXIT_S = 10.0, 5.0

# Of a rank that is stopped because of another, what it was doing is of use only if it stood still for so long.
_WORTH_A_LOOK_S = 2.0

# What TensorFlow prints whenever it starts, whatever its log level; the last lines of an error have better to say.
_NOISE = re.compile(r"absl::InitializeLog|oneDNN custom operations are on")


@dataclass(frozen=True)
class Patience:
    """How long a process is waited for.

    Parameters
    ----------
    start_s
        Seconds until it must have begun its work.
    stall_s
        Seconds without a sign of life, or without moving on; ``None`` waits for ever.
    """

    start_s: float
    stall_s: float | None = None


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
        self._asked = time.monotonic()
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
        patience: Patience,
        own: bytes = b"",
        alarm: Alarm | None = None,
        folder: str | None = None,
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
        patience
            How long to wait for it.
        own
            Arguments of this rank alone, as a pickled tuple; they come before those of the work.
        alarm
            Rung when the rank fails; when it rings, the rank is ended.
        folder
            The rank's own, which the caller removes; the guard does where the caller is gone.
        """
        deadline = time.monotonic() + patience.start_s
        kills_before = kills_for_memory()
        process = self._confirmed(context, patience.start_s / 2)
        if folder is not None:
            process.own(folder)
        tail: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
        process.read_output(lambda output: _pump(output, context, log, tail))
        stacks = ""
        try:
            process.hand_over({**environment, ASKED: repr(self._asked)}, payload, own)
            answers = Answers(process, deadline, patience.stall_s, alarm)
            answer = answers.final()
            ended, sign = time.time(), answers.sign
            if alarm is not None and (answer is None or answer[0] != DONE):
                alarm.ring()
            if answers.stall or (answers.stopped and sign.stall(_WORTH_A_LOOK_S)):
                stacks = _stacks(process, environment.get(STACKS))
            elif not answers.timed_out and not answers.stopped:
                process.wait(_EXIT_S if answer is None or answer[0] != DONE else _FINISH_S)
        finally:
            process.end()
            if alarm is not None:
                alarm.through()
        if answer is not None and answer[0] == DONE:
            return Outcome(result=answer[1])
        kind: FailureKind
        if answer is not None:
            said, error, details = answer[1].decode(errors="replace").split("\0", 2)
            kind = cast(FailureKind, said)
        else:
            kind, error = _describe_end(process, answers, patience, kills_for_memory() - kills_before)
            details = stacks
        left = ""
        if process.left:
            left = f"{process.left} cannot be killed; a file system or a device of {context.host} may not answer it"
        if log is not None:
            _write_lines(log, context, [error, *left.splitlines(), *details.splitlines()])
        tail_text = "\n".join(tail)
        return Outcome(failure=Failure(context.rank, context.host, kind, error, details, tail_text, ended, sign, left))

    def _confirmed(self, context: RankContext, timeout_s: float) -> TrainingProcess:
        """Return a process that is certainly there: a pool that fails costs time, never the fit."""
        if not self._process.is_there(timeout_s):
            logger.warning("[%s] the warm pool gave no training process; starting a cold one", context)
            self._process.end()
            self._process = ColdProcess(self._recipe)
        return self._process


def _describe_end(
    process: TrainingProcess, answers: Answers, patience: Patience, kills: int
) -> tuple[FailureKind, str]:
    """Say what became of a process that gave no answer: kind and error."""
    if answers.stopped:
        return "cut" if answers.is_cut else "peer", f"stopped, because {answers.cause}"
    if answers.stall:
        return "stalled", answers.stall
    if answers.timed_out:
        late = f"the training process did not begin within {patience.start_s:g} s"
        return "late", f"{late}; a slow disk or a busy host can be the cause: raise start_timeout"
    kind: FailureKind = "died" if answers.ready else "killed"
    early = "" if answers.ready else " before it began with its work"
    if process.left:
        return kind, f"the training process gave no result{early} and did not end"
    code, peak_bytes = process.wait(), process.peak_bytes
    held = f"; it held {show_bytes(peak_bytes)} of memory at most" if peak_bytes else ""
    if code is None or code >= 0:
        # What ends by itself before its work would do so again.
        kind = "died" if answers.ready else "start"
        return kind, f"the training process ended with exit code {code} before it gave a result{held}"
    name = signal.Signals(-code).name
    if -code == signal.SIGKILL and kills > 0:
        remedy = "give executors more (spark.executor.memoryOverhead), or ranks less (batch_size, cache='disk')"
        return kind, f"the training process was killed by {name}{early}, because memory ran out{held}. {remedy}"
    return kind, f"the training process was killed by {name}{early}{held}"


def _stacks(process: TrainingProcess, place: str | None) -> str:
    """Have a process that stands still write what its threads are doing, and return that."""
    if place is None:
        return ""
    process.show_stacks()
    deadline = time.monotonic() + _STACKS_TIMEOUT_S
    found, before = "", None
    # It is written in one go; what no longer grows is whole.
    while time.monotonic() < deadline and (not found or found != before):
        before = found
        time.sleep(_STACKS_POLL_S)
        with contextlib.suppress(OSError):
            found = Path(place).read_text(errors="replace")
    return found


class _LastLine:
    """What an error tells of a line of output: what a terminal would show of it, up to a length."""

    def __init__(self) -> None:
        self._shown, self._cut = "", 0

    def __str__(self) -> str:
        return f"{self._shown} … ({self._cut} more characters)" if self._cut else self._shown

    def add(self, piece: str) -> None:
        """Add a part of the line, the last of which has its end."""
        ended = piece.removesuffix("\r\n").removesuffix("\n")
        _, is_overwritten, text = ended.rpartition("\r")
        if is_overwritten:
            self._shown, self._cut = "", 0
        fits = _TAIL_LINE_CHARS - len(self._shown)
        self._shown += text[:fits]
        self._cut += len(text[fits:])


def _pump(stream: IO[bytes], context: RankContext, log: IO[bytes] | None, tail: collections.deque[str]) -> None:
    """Copy the process's output to its log, each line with the rank before it, however long it is."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    line: _LastLine | None = None
    # A progress bar that only returns to the line's beginning never ends it.
    while piece := stream.readline(_PIECE_BYTES):
        text = decoder.decode(piece, final=piece.endswith(b"\n"))
        if log is not None and not _write(log, context, [text if line else f"[{context}] {text}"]):
            log = None
        line = line or _LastLine()
        line.add(text)
        if text.endswith("\n"):
            _keep(line, tail)
            line = None
    if line is not None:
        _keep(line, tail)
        if log is not None:
            _write(log, context, ["\n"])


def _keep(line: _LastLine, tail: collections.deque[str]) -> None:
    if not _NOISE.search(str(line)):
        tail.append(str(line))


def _write_lines(log: IO[bytes], context: RankContext, lines: Iterable[str]) -> bool:
    """Write lines to the log, each with the rank before it; ``False`` when the log cannot be written."""
    return _write(log, context, (f"[{context}] {line}\n" for line in lines))


def _write(log: IO[bytes], context: RankContext, texts: Iterable[str]) -> bool:
    """Write texts to the log as they are; ``False`` when it cannot be written."""
    try:
        log.writelines(text.encode() for text in texts)
        log.flush()
    except Exception as exc:  # noqa: BLE001 - a Store's own kind of error must not stop the reading of the output
        logger.warning("[%s] cannot write the log: %s", context, exc)
        return False
    return True
