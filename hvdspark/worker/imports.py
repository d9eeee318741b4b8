"""How long the launch of a rank took for imports: nothing where a warm parent has done them before."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

# By the machine's own clock, which a fork goes on with: what a parent has timed, its ranks know.
_span = (0.0, 0.0)
_asked = 0.0


@contextmanager
def timed() -> Iterator[None]:
    """Time the imports, which are the block."""
    global _span
    began = time.monotonic()
    yield
    _span = (began, time.monotonic())


def asked(moment: float) -> None:
    """Say when the task asked for this process, by the same clock."""
    global _asked
    _asked = moment


def waited_s() -> float:
    """Return the seconds from when the process was asked for in which it was importing."""
    began, ended = _span
    return max(0.0, ended - max(began, _asked))
