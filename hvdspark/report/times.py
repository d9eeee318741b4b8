"""Where the time of a run went: by phase, by epoch and by rank."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from hvdspark.history import EpochRecord, RankTimes
from hvdspark.runs import RunRecord


@dataclass(frozen=True)
class Part:
    """One part of the time.

    Parameters
    ----------
    name
        As readers call it.
    meaning
        What happened in it.
    seconds
        How long it took.
    ink
        The name of its colour.
    """

    name: str
    meaning: str
    seconds: float
    ink: str


@dataclass(frozen=True)
class RankMean:
    """What a rank did in a usual epoch, on average.

    Parameters
    ----------
    rank, host
        Which one.
    wait_s, compute_s, allreduce_s
        Seconds of an epoch that it waited for rows, computed, and averaged gradients, which includes waiting for
        slower ranks.
    slowest_in
        In how many of all epochs no other took longer for its own work.
    """

    rank: int
    host: str
    wait_s: float
    compute_s: float
    allreduce_s: float
    slowest_in: int

    @property
    def own_s(self) -> float:
        """Seconds of an epoch that it took for its own work, in which it waited for no other rank."""
        return self.wait_s + self.compute_s

    @property
    def name(self) -> str:
        """Rank and host."""
        return f"rank {self.rank} on {self.host}"


@dataclass(frozen=True)
class Spread:
    """How far apart ranks were in an epoch, in seconds of their own work.

    Parameters
    ----------
    epoch
        Its number.
    fastest, slowest
        The ranks at the ends.
    """

    epoch: int
    fastest: RankTimes
    slowest: RankTimes

    @property
    def least_s(self) -> float:
        """What the fastest took."""
        return self.fastest.own_s

    @property
    def most_s(self) -> float:
        """What the slowest took."""
        return self.slowest.own_s


LAGGING = 0.15
"""By how much a rank's own work is longer than the others' where they are said to wait for it."""

# By name of the phase: how readers call it, what happens in it, its colour.
_PHASES = {
    "stages": ("stages", "a job fits the stages before the network", "setup-1"),
    "check": ("check", "parameters, schema and cluster are looked at before any job", "setup-1"),
    "write": ("write", "the rows become a dataset in the Store; an earlier fit's is taken as it is", "setup-2"),
    "launch": ("launch", "Spark starts the ranks, and they meet", "setup-3"),
    "import": ("import", "the ranks load TensorFlow, where the warm pool has not done so before", "setup-4"),
    "prepare": ("prepare", "the ranks build and compile the model", "setup-5"),
    "publish": ("publish", "the trained model goes into the Store and comes back to the driver", "setup-6"),
    "save": ("save", "a job saves the whole pipeline", "rest"),
    "evaluate": ("evaluate", "it compares the model with the one in use, on held-out rows", "rest"),
    "promote": ("promote", "it lets the aliases refer to the model", "rest"),
}
_TRAIN = "train"


def breakdown(record: RunRecord, epochs: Sequence[EpochRecord]) -> list[Part]:
    """Divide the time of a run; what took no time is left out.

    Parameters
    ----------
    record, epochs
        What is known of it; the training is divided where there is a history.
    """
    parts: list[Part] = []
    for phase, seconds in record.phases.items():
        if phase != _TRAIN:
            name, meaning, ink = _PHASES.get(phase, (phase, "", "rest"))
            parts.append(Part(name, meaning, seconds, ink))
    # The training comes after what prepares it, whatever a record's order.
    before_end = next((place for place, part in enumerate(parts) if part.name == "publish"), len(parts))
    parts[before_end:before_end] = _training(record.phases.get(_TRAIN), epochs)
    return [part for part in parts if part.seconds > 0]


def _training(whole: float | None, epochs: Sequence[EpochRecord]) -> list[Part]:
    validation_s = sum(epoch.validation_s or 0.0 for epoch in epochs)
    known = [
        Part("compute", "steps run: forward, backward, update", _over_ranks(epochs, "compute_s"), "compute"),
        Part(
            "allreduce",
            "gradients are averaged, which includes waiting for slower ranks",
            _over_ranks(epochs, "allreduce_s"),
            "allreduce",
        ),
        Part("data wait", "steps wait for rows", _over_ranks(epochs, "data_wait_s"), "wait"),
        Part(
            "validation",
            "the validation rows are evaluated",
            validation_s,
            "validate",
        ),
    ]
    if whole is None:
        return known
    rest = whole - sum(part.seconds for part in known)
    if not epochs:
        return [Part("train", "all epochs; this run has no history that divides them", whole, "compute")]
    return [*known, Part("other training", "callbacks, checkpoints, and what an epoch begins with", rest, "rest")]


def _over_ranks(epochs: Sequence[EpochRecord], what: str) -> float:
    """Return the seconds that ranks took for something, on average over the ranks of each epoch."""
    return sum(mean(epoch, what) for epoch in epochs)


def mean(epoch: EpochRecord, what: str) -> float:
    """Return the average of a value over the ranks of an epoch."""
    return statistics.fmean(getattr(rank, what) for rank in epoch.ranks) if epoch.ranks else 0.0


def usual(epochs: Sequence[EpochRecord]) -> Sequence[EpochRecord]:
    """Leave out the first epoch, which also reads the files and compiles, unless it is the only one."""
    return epochs[1:] or epochs


def by_rank(epochs: Sequence[EpochRecord]) -> list[RankMean]:
    """Return what each rank did in a usual epoch, in the order of ranks."""
    found: dict[int, list[RankTimes]] = defaultdict(list)
    slowest: dict[int, int] = defaultdict(int)
    for epoch in usual(epochs):
        for rank in epoch.ranks:
            found[rank.rank].append(rank)
    for spread in spreads(epochs):
        slowest[spread.slowest.rank] += 1
    return [
        RankMean(
            number,
            times[-1].host,
            wait_s=statistics.fmean(rank.data_wait_s for rank in times),
            compute_s=statistics.fmean(rank.compute_s for rank in times),
            allreduce_s=statistics.fmean(rank.allreduce_s for rank in times),
            slowest_in=slowest[number],
        )
        for number, times in sorted(found.items())
    ]


def lags(rank: RankMean, ranks: Sequence[RankMean]) -> bool:
    """Whether the others have to wait for a rank: its own work takes clearly longer than theirs."""
    others = [other.own_s for other in ranks if other is not rank]
    return bool(others) and rank.own_s > statistics.median(others) * (1 + LAGGING)


def spreads(epochs: Sequence[EpochRecord]) -> list[Spread]:
    """Return how far apart ranks were in each epoch of which that is known."""
    return [
        Spread(epoch.epoch, min(epoch.ranks, key=lambda times: times.own_s), epoch.slowest)
        for epoch in epochs
        if epoch.slowest is not None
    ]
