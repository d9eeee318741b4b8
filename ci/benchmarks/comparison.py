"""Pure arithmetic: two contestants measured in turns become one row of the table.

A ratio says how many times better ours is, whatever is measured: 2 is twice the rows per second, or half the seconds.
So one sense of "at least" fits every target.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

# Of these, more is better; of all other units (s, MB, %) less is.
RATES = ("rows/s", "samples/s")


class SkippedError(Exception):
    """There is nothing to compare; the message says why."""


@dataclass(frozen=True)
class Comparison:
    """What was measured of both contestants, in turns.

    Parameters
    ----------
    name
        What is compared, with what.
    unit
        Unit of the values; one of `RATES` or a cost.
    ours, theirs
        The value of each repeat; a single value of one side stands beside all of the other's.
    target
        The ratio to reach, or ``None`` where it is only of interest.
    note
        What else a reader has to know.
    """

    name: str
    unit: str
    ours: Sequence[float]
    theirs: Sequence[float]
    target: float | None = None
    note: str = ""

    def ratios(self) -> list[float]:
        """Return how many times better ours was in each repeat."""
        repeats = max(len(self.ours), len(self.theirs))
        pairs = zip(_stretched(self.ours, repeats), _stretched(self.theirs, repeats), strict=True)
        return [ours / theirs if self.unit in RATES else theirs / ours for ours, theirs in pairs]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Parameters
    ----------
    name, unit, target, note
        As in :class:`Comparison`.
    state
        ``"ok"``, ``"missed"``, ``"info"`` (no target), ``"skipped"`` or ``"failed"``.
    ratio
        Median of the repeats' ratios.
    ours, theirs
        Medians of the values.
    repeats
        How often both were measured.
    spread
        Lowest and highest ratio of a repeat.
    """

    name: str
    state: str
    ratio: float | None = None
    target: float | None = None
    ours: float | None = None
    theirs: float | None = None
    unit: str = ""
    repeats: int = 0
    spread: list[float] | None = None
    note: str = ""

    @classmethod
    def of(cls, comparison: Comparison) -> Row:
        """Sum up a comparison.

        The ratio is the median of the ratios, not the ratio of the medians: what slows the machine down for a while
        slows both contestants of a repeat.
        """
        ratios = comparison.ratios()
        ratio, target = statistics.median(ratios), comparison.target
        return cls(
            name=comparison.name,
            state="info" if target is None else "ok" if ratio >= target else "missed",
            ratio=ratio,
            target=target,
            ours=statistics.median(comparison.ours),
            theirs=statistics.median(comparison.theirs),
            unit=comparison.unit,
            repeats=len(ratios),
            spread=[min(ratios), max(ratios)],
            note=comparison.note,
        )

    def to_json(self) -> dict[str, Any]:
        """Return JSON values; ``ok`` is ``None`` where there is nothing to reach or to judge."""
        ok = {"ok": True, "missed": False, "failed": False}.get(self.state)
        return {**dataclasses.asdict(self), "ok": ok}


def interleaved(repeats: int, *contestants: Callable[[], float]) -> list[list[float]]:
    """Measure contestants in turns.

    Parameters
    ----------
    repeats
        How many rounds. Every second one goes backwards, so that nobody always comes first.
    contestants
        Functions that measure once.

    Returns
    -------
    list of list of float
        The values of each contestant, by round.
    """
    values: list[list[float]] = [[] for _ in contestants]
    for round_number in range(repeats):
        order = list(zip(contestants, values, strict=True))
        for measure, found in order if round_number % 2 == 0 else reversed(order):
            found.append(measure())
    return values


def seconds(work: Callable[[], object]) -> float:
    """Return the seconds that some work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _stretched(values: Sequence[float], repeats: int) -> Sequence[float]:
    return list(values) * repeats if len(values) == 1 else values
