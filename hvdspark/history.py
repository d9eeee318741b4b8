"""What a run measured, epoch by epoch, and how far it is: two files in its folder, which its first rank writes."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self, TypeVar

from hvdspark.errors import StoreError
from hvdspark.layout import HISTORY, PROGRESS, run_folder
from hvdspark.plain import finite_only, numbers, to_json
from hvdspark.store import Store

# The parts of a rank's time, and what people call them.
_PARTS = {"data_wait_s": "data wait", "allreduce_s": "allreduce", "compute_s": "compute"}

Found = TypeVar("Found")


@dataclass(frozen=True)
class RankTimes:
    """Where the time of one rank went in the training steps of an epoch, in seconds.

    Parameters
    ----------
    rank, host
        Whose times these are.
    seconds
        All of it, without validation.
    data_wait_s
        Waiting for rows.
    allreduce_s
        Averaging gradients: from when this rank has its own to when it has the average. So it is mostly the time that
        it waited for slower ranks; the transfer comes to it. Zero for a rank that is alone.
    compute_s
        The rest: the steps themselves, and callbacks between them.
    """

    rank: int
    host: str
    seconds: float
    data_wait_s: float
    allreduce_s: float
    compute_s: float

    @property
    def own_s(self) -> float:
        """What the rank took for itself, and others may have waited for: all but the averaging."""
        return self.seconds - self.allreduce_s


@dataclass(frozen=True)
class EpochRecord:
    """What is known of an epoch that has ended.

    Parameters
    ----------
    epoch
        Its number, counted from 1.
    started
        When it began, in seconds since 1970, by the clock of the first rank's host. Where the training went on within
        the epoch, when it did; times and rows are those from there on.
    seconds
        What the training steps took the first rank.
    rows, rows_per_s
        Training rows of all ranks, and how many of them per second.
    learning_rate
        That of the last step, as it was used: multiplied by the number of ranks where the estimator does so. ``None``
        where the optimizer has none.
    metrics
        Those of the epoch over the rows of all ranks, as in the history; NaN for what is not finite.
    validation_s
        Seconds that the validation took; ``None`` without one.
    ranks
        Where the time went, by rank.
    """

    epoch: int
    started: float
    seconds: float
    rows: int
    rows_per_s: float
    learning_rate: float | None
    metrics: Mapping[str, float]
    validation_s: float | None
    ranks: tuple[RankTimes, ...]

    @property
    def key(self) -> tuple[int, float]:
        """What tells epochs apart, also where one was trained anew."""
        return self.epoch, self.started

    @property
    def ended(self) -> float:
        """When it had ended, validation and all, in seconds since 1970."""
        return self.started + self.seconds + (self.validation_s or 0.0)

    @property
    def slowest(self) -> RankTimes | None:
        """The rank that the others waited for: which took longest without the averaging. ``None`` for a single one."""
        return max(self.ranks, key=lambda times: times.own_s) if len(self.ranks) > 1 else None

    def span(self, name: str) -> tuple[float, float]:
        """Return the least and the most over the ranks of one of the values of :class:`RankTimes`."""
        values = [getattr(times, name) for times in self.ranks]
        return min(values), max(values)

    def to_plain(self) -> dict[str, Any]:
        """Describe the record by JSON values."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        plain: dict[str, Any] = finite_only({**values, "ranks": [vars(times) for times in self.ranks]})
        return plain

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Self:
        """Read what :meth:`to_plain` made; raises ``KeyError``, ``TypeError`` or ``ValueError`` for anything else."""
        metrics = numbers(values["metrics"])
        ranks = tuple(RankTimes(**_known(RankTimes, times)) for times in values["ranks"])
        return cls(**{**_known(cls, values), "metrics": metrics, "ranks": ranks})


@dataclass(frozen=True)
class Progress:
    """How far a training is, about a second ago.

    Parameters
    ----------
    epoch, epochs
        The epoch that it is at, counted from 1, and how many there will be at most.
    step, steps
        Steps of this epoch that were taken, and how many it has.
    rows_per_s
        Training rows of all ranks per second, in this epoch so far.
    loss, metrics
        Those of this epoch so far, over the rows of the first rank alone; in an epoch's first second those of the one
        before. The loss is ``None`` before there is one.
    time
        When this was, in seconds since 1970, by the clock of the first rank's host.
    """

    epoch: int
    epochs: int
    step: int
    steps: int
    rows_per_s: float
    loss: float | None
    metrics: Mapping[str, float] = field(default_factory=dict)
    time: float = 0.0

    def to_plain(self) -> dict[str, Any]:
        """Describe it by JSON values."""
        plain: dict[str, Any] = finite_only(asdict(self))
        return plain

    @classmethod
    def from_plain(cls, values: Mapping[str, Any]) -> Self:
        """Read what :meth:`to_plain` made; raises ``KeyError``, ``TypeError`` or ``ValueError`` for anything else."""
        metrics = numbers(values.get("metrics", {}))
        return cls(**{**_known(cls, values), "metrics": metrics})


def write_history(store: Store, run_id: str, epochs: Sequence[EpochRecord]) -> None:
    """Replace the history of a run; raises :class:`StoreError` when it cannot be written."""
    write_plain_history(store, run_id, [record.to_plain() for record in epochs])


def write_plain_history(store: Store, run_id: str, epochs: Sequence[Mapping[str, Any]]) -> None:
    """Replace the history of a run by what :meth:`EpochRecord.to_plain` gave; errors as :func:`write_history`."""
    # Not looked through for what JSON lacks: a training of many epochs writes all of them after each.
    store.publish_bytes(json.dumps({"epochs": epochs}, allow_nan=False).encode(), _place(run_id, HISTORY))


def write_progress(store: Store, run_id: str, progress: Progress) -> None:
    """Replace what is said of a run's progress; raises :class:`StoreError` when it cannot be written."""
    store.publish_bytes(to_json(progress.to_plain()).encode(), _place(run_id, PROGRESS))


def read_history(store: Store, run_id: str) -> tuple[EpochRecord, ...]:
    """Return the epochs of a run that have ended, in order; empty where there are none, or no such run.

    Raises
    ------
    StoreError
        When there is something else in the file.
    """
    return tuple(_read(store, run_id, HISTORY, _records) or ())


def read_progress(store: Store, run_id: str) -> Progress | None:
    """Return how far a run is; ``None`` before its first step.

    Raises
    ------
    StoreError
        When there is something else in the file.
    """
    return _read(store, run_id, PROGRESS, Progress.from_plain)


def by_metric(epochs: Sequence[EpochRecord]) -> dict[str, list[float]]:
    """Return the values of each metric by epoch, as Keras' history has them."""
    found: dict[str, list[float]] = {}
    for record in epochs:
        for name, value in record.metrics.items():
            found.setdefault(name, []).append(value)
    return found


class Table(str):
    """A text that a console and a notebook show as it is, line by line."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def epoch_table(epochs: Sequence[EpochRecord]) -> Table:
    """Lay epochs out as a table: metrics, times, and for the parts of the time the least and the most of the ranks."""
    if not epochs:
        return Table("no epochs are known")
    metrics = list(dict.fromkeys(name for record in epochs for name in record.metrics))
    titles = ("epoch", *metrics, "rate", "seconds", "validation", "rows/s", *_PARTS.values(), "slowest rank")
    rows = [titles, *(_cells(record, metrics) for record in epochs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(titles))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return Table("\n".join(lines))


def _cells(record: EpochRecord, metrics: Sequence[str]) -> tuple[str, ...]:
    slowest = record.slowest
    return (
        str(record.epoch),
        *(f"{record.metrics[name]:.4g}" if name in record.metrics else "-" for name in metrics),
        "-" if record.learning_rate is None else f"{record.learning_rate:.3g}",
        f"{record.seconds:.2f} s",
        "-" if record.validation_s is None else f"{record.validation_s:.2f} s",
        f"{record.rows_per_s:,.0f}",
        *("{:.2f}-{:.2f} s".format(*record.span(name)) for name in _PARTS),
        "-" if slowest is None else f"{slowest.rank} on {slowest.host}, {slowest.own_s:.2f} s",
    )


def _records(values: Mapping[str, Any]) -> list[EpochRecord]:
    return [EpochRecord.from_plain(record) for record in values["epochs"]]


def _read(store: Store, run_id: str, name: str, make: Callable[[Mapping[str, Any]], Found]) -> Found | None:
    values = store.read_json(_place(run_id, name))
    if values is None:
        return None
    try:
        return make(values)
    except (KeyError, TypeError, ValueError, AttributeError) as exc:
        url = store.url_of(_place(run_id, name))
        raise StoreError(f"{url} is damaged, or of another version: {exc!r}", url=url) from exc


def _place(run_id: str, name: str) -> str:
    return posixpath.join(run_folder(run_id), name)


def _known(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out what a later version may have added."""
    names = {item.name for item in fields(cls)}
    return {name: value for name, value in values.items() if name in names}
