"""How fast the steps are, how long they wait for rows, and how many of them to take at a time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

# Seconds that a call of a compiled function should take at most. Nobody sees what it does meanwhile: the progress that
# is shown stands still, and a rank that does not move on for longer than stall_timeout_s is taken to hang.
CALL_S = 1.0


class Pace:
    """How many steps a call of a compiled function takes: fewer where they are slow.

    Parameters
    ----------
    most
        How many at most.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.steps = 1
        """For the next call. The first has one: how long a step takes is not known before."""

    @contextmanager
    def call(self, count: int) -> Iterator[None]:
        """Time a call, which is the block, of so many steps."""
        began = time.perf_counter()
        yield
        seconds = time.perf_counter() - began
        if seconds > CALL_S:
            self.steps = max(1, count // 2)
        elif count == self.steps and 2 * seconds <= CALL_S:
            self.steps = min(2 * count, self._most)


class StepClock:
    """Times epochs; the first one, in which functions are traced, counts only when there is no other."""

    def __init__(self) -> None:
        self._waited_s = 0.0
        self._epochs: list[tuple[int, float, float]] = []
        self._started = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time in the block as waiting for rows."""
        began = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - began

    def start(self) -> None:
        """Begin an epoch."""
        self._waited_s = 0.0
        self._started = time.perf_counter()

    def stop(self, rows: int) -> None:
        """End an epoch in whose steps all ranks together had so many rows."""
        self._epochs.append((rows, time.perf_counter() - self._started, self._waited_s))

    @property
    def last(self) -> tuple[float, float]:
        """Seconds that the steps of the last epoch took, and how long they waited for rows."""
        _, seconds, waited_s = self._epochs[-1]
        return seconds, waited_s

    @property
    def rows_per_s(self) -> float:
        """Rows of all ranks per second."""
        rows, seconds, _ = self._sums()
        return rows / seconds

    @property
    def wait_share(self) -> float:
        """Share of the time that this rank's steps waited for rows, from 0 to 1."""
        _, seconds, waited_s = self._sums()
        return waited_s / seconds

    def _sums(self) -> tuple[int, float, float]:
        if not self._epochs:  # an attempt that had nothing left to do
            return 0, 1e-9, 0.0
        rows, seconds, waited_s = zip(*(self._epochs[1:] or self._epochs), strict=True)
        return sum(rows), max(sum(seconds), 1e-9), sum(waited_s)
