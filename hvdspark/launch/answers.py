"""What a training process tells its task, frame by frame, and what its silence says.

Besides its answer a process sends a sign of life every second: how often it has moved on, and what it is at. One that
sends none was stopped, or is in code that does not let go of Python's lock; one that sends them and does not move on
hangs in its own code, or waits for a rank that does.
"""

from __future__ import annotations

import json
import os
import select
import struct
import time
from dataclasses import dataclass
from typing import Any

from hvdspark.launch.alarm import Alarm
from hvdspark.launch.process import TrainingProcess

FRAME = struct.Struct(">cQ")
READY, DONE, FAILED, PULSE = b"R", b"D", b"F", b"P"

# Seconds between two signs of life.
PULSE_S = 1.0
# As long without one, and a process is not merely busy.
SILENCE_S = 4.0
# The least time after which it may be given up.
LEAST_STALL_S = 5.0

# When the alarm rings, a rank has this long to say what it knows of it: it may be the one that failed first.
ALARM_GRACE_S = 1.0


@dataclass(frozen=True)
class LifeSign:
    """The last that was heard of a rank.

    Parameters
    ----------
    moves
        How often it had moved on; 0 for work that does not say.
    doing
        What it was at.
    idle_s
        Seconds since it moved on.
    silent_s
        Seconds since it gave a sign of life at all.
    """

    moves: int = 0
    doing: str = ""
    idle_s: float = 0.0
    silent_s: float = 0.0

    @property
    def is_silent(self) -> bool:
        """Whether the process itself stood still, not just its work."""
        return self.silent_s > SILENCE_S

    def stall(self, timeout_s: float | None) -> str:
        """Say what hangs, where something has for as long as is allowed; an empty text where not."""
        if timeout_s is None:
            return ""
        is_idle = self.moves > 0 and self.idle_s >= timeout_s
        # One that was stopped may have moved on for the last time some seconds before its last sign of life.
        if self.silent_s >= timeout_s or (is_idle and self.is_silent):
            return (
                f"the training process gave no sign of life for {self.silent_s:.0f} s{self._place('last seen at ')};"
                " it was stopped, or is in code that does not let go of Python's lock"
            )
        return f"the training did not move on for {self.idle_s:.0f} s{self._place()}" if is_idle else ""

    def _place(self, how: str = "") -> str:
        return f" ({how}{self.doing})" if self.doing else ""


class Answers:
    """The frames of a process, as they arrive.

    Parameters
    ----------
    process
        Who sends them.
    deadline
        When it must have begun its work, by the monotonic clock.
    stall_timeout_s
        Seconds without a sign of life, or without moving on, after which it is given up; ``None`` waits for ever.
    alarm
        After which it is given up as well.
    """

    def __init__(
        self, process: TrainingProcess, deadline: float, stall_timeout_s: float | None, alarm: Alarm | None
    ) -> None:
        self._process = process
        self._deadline = deadline
        self._stall_timeout_s = stall_timeout_s
        self._alarm = alarm
        self._rung_at: float | None = None
        self._buffer = b""
        self._moves, self._doing = 0, ""
        self._moved_at = self._heard_at = time.monotonic()
        self.ready = False
        self.timed_out = False
        self.stopped = False
        self.cause, self.is_cut = "", False
        self.stall = ""

    @property
    def sign(self) -> LifeSign:
        """The last sign of life."""
        now = time.monotonic()
        return LifeSign(self._moves, self._doing, now - self._moved_at, now - self._heard_at)

    def final(self) -> tuple[bytes, bytes] | None:
        """Wait for the last answer; ``None`` when the process ended or was given up without one."""
        while True:
            frame = self._frame()
            if frame is None or frame[0] in (DONE, FAILED):
                return frame
            self._heard_at = time.monotonic()
            if frame[0] == READY:
                self.ready = True
                continue
            moves, self._doing = json.loads(frame[1])
            if moves != self._moves:
                self._moves, self._moved_at = moves, self._heard_at

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
            if self.ready and self._rung_at is None:
                self.stall = self.sign.stall(self._stall_timeout_s)
                if self.stall:
                    return None
            waited_for: list[Any] = [self._process.answers]
            if self._alarm is not None and self._rung_at is None:
                waited_for.append(self._alarm)
            # Woken now and then, because a grandchild may hold the pipe open after the process is gone.
            readable, _, _ = select.select(waited_for, [], [], 1.0 if left is None else min(left, 1.0))
            if self._alarm is not None and self._alarm in readable:
                self._rung_at = time.monotonic()
                self.cause, self.is_cut = self._alarm.cause()
            if self._process.answers in readable:
                chunk = os.read(self._process.answers, 1 << 20)
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
