"""The charts of a report: which there are, and what each says."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hvdspark.history import EpochRecord
from hvdspark.metrics import best_place, rises
from hvdspark.report import words
from hvdspark.report.figures import Chart, Series, lines, spans, stacks
from hvdspark.report.times import mean, spreads
from hvdspark.runs import RunRecord

STEP_PARTS = (("data wait", "wait"), ("compute", "compute"), ("allreduce", "allreduce"))
"""What ranks do in a training step, and the colours of it."""

_VAL = "val_"
# Keras' callbacks log it among the metrics, but it is no result.
_RATE_NAMES = ("learning_rate", "lr")


@dataclass(frozen=True)
class Card:
    """A chart with what stands around it.

    Parameters
    ----------
    title
        Above it.
    legend
        Name, colour and last value of each series.
    svg
        The chart.
    caption
        Below it.
    """

    title: str
    legend: Sequence[tuple[str, str, str]]
    svg: str
    caption: str = ""


def metric_names(epochs: Sequence[EpochRecord]) -> list[str]:
    """Return the names of all metrics: the loss first, each followed by that of the validation."""
    names = list(dict.fromkeys(name for epoch in epochs for name in epoch.metrics if name not in _RATE_NAMES))
    bases = list(dict.fromkeys(_base(name) for name in names))
    bases.sort(key=lambda base: base != "loss")
    return [name for base in bases for name in (base, _VAL + base) if name in names]


def marked(record: RunRecord, epochs: Sequence[EpochRecord]) -> int | None:
    """Return the place of the epoch whose model was kept, or else whose validation loss is the lowest."""
    if record.state == "finished" and record.epoch is not None:
        return next((place for place, epoch in enumerate(epochs) if epoch.epoch == record.epoch), None)
    losses = [epoch.metrics.get("val_loss", math.nan) for epoch in epochs]
    if not any(math.isfinite(loss) for loss in losses):
        return None
    return best_place(losses, rising=False)


def curves(record: RunRecord, epochs: Sequence[EpochRecord]) -> list[Card]:
    """Draw each metric, train and validation together, and the learning rate."""
    names = metric_names(epochs)
    place = marked(record, epochs)
    cards = []
    for number, base in enumerate(dict.fromkeys(_base(name) for name in names)):
        series = [
            Series(name, [epoch.metrics.get(key) for epoch in epochs], ink, marker)
            for name, key, ink, marker in (("train", base, "train", "o"), ("validation", _VAL + base, "val", "s"))
            if key in names
        ]
        chart = Chart(f"curve{number}", _told(base, epochs, series), _numbers(epochs), series)
        ring = place if place is not None and math.isfinite(series[-1].drawn[place]) and len(epochs) > 1 else None
        svg = lines(chart, best=ring, may_be_log=True)
        cards.append(Card(base, _legend(series), svg, _ring(record, epochs, ring) or _direction(base)))
    return [*cards, *_learning_rate(epochs)]


def _base(name: str) -> str:
    return name.removeprefix(_VAL)


def _numbers(epochs: Sequence[EpochRecord]) -> list[int]:
    return [epoch.epoch for epoch in epochs]


def _told(name: str, epochs: Sequence[EpochRecord], series: Sequence[Series]) -> str:
    """Tell the chart in a sentence, for those who cannot see it."""
    ends = [
        f"{one.name} from {words.number(one.finite[0])} to {words.number(one.finite[-1])}"
        for one in series
        if one.finite
    ]
    return f"{name}, {_range(epochs)}: {'; '.join(ends) or 'no finite value'}"


def _range(epochs: Sequence[EpochRecord]) -> str:
    first, last = epochs[0].epoch, epochs[-1].epoch
    return f"epoch {first}" if first == last else f"epochs {first} to {last}"


def _legend(series: Sequence[Series]) -> list[tuple[str, str, str]]:
    lasts = [(one, one.values[-1]) for one in series]
    return [(one.name, one.ink, words.NONE if last is None else words.number(last)) for one, last in lasts]


def _ring(record: RunRecord, epochs: Sequence[EpochRecord], ring: int | None) -> str:
    if ring is None:
        return ""
    epoch = epochs[ring].epoch
    if record.state == "finished" and record.epoch == epoch:
        return f"The ring is epoch {epoch}, whose model was kept."
    return f"The ring is epoch {epoch}, that of the lowest validation loss."


def _direction(base: str) -> str:
    return "Higher is better." if rises(base) else ""


def _learning_rate(epochs: Sequence[EpochRecord]) -> list[Card]:
    rates = [epoch.learning_rate for epoch in epochs]
    # The table has it; a single one makes no curve.
    if len(epochs) < 2 or all(rate is None for rate in rates):
        return []
    series = [Series("learning rate", rates, "single")]
    chart = Chart("rate", _told("learning rate", epochs, series), _numbers(epochs), series)
    is_constant = len(set(series[0].finite)) == 1
    caption = "The same in all epochs." if is_constant else ""
    svg = lines(chart, may_be_log=True, from_zero=is_constant)
    return [Card("learning rate", [("", "single", words.rate(series[0].finite[-1]))], svg, caption)]


def pace(epochs: Sequence[EpochRecord]) -> list[Card]:
    """Draw how long epochs took, divided as far as that is known, and how many rows a second they trained."""
    if not epochs:
        return []
    divisor, unit = _time_unit(max(epoch.seconds + (epoch.validation_s or 0.0) for epoch in epochs))
    divided = [
        Series(name, [mean(epoch, f"{what}_s") / divisor for epoch in epochs], ink)
        for (name, ink), what in zip(STEP_PARTS, ("data_wait", "compute", "allreduce"), strict=True)
    ]
    validation = Series("validation", [(epoch.validation_s or 0.0) / divisor for epoch in epochs], "validate")
    has_ranks = any(epoch.ranks for epoch in epochs)
    series = [one for one in (*divided, validation) if any(one.finite)] if has_ranks else []
    series = series or [Series("epoch", [epoch.seconds / divisor for epoch in epochs], "single")]
    told = f"time of each epoch, {_range(epochs)}, in {unit}; the table of epochs has the numbers"
    time_card = Card(
        "time of each epoch",
        [(one.name, one.ink, "") for one in series],
        stacks(Chart("seconds", told, _numbers(epochs), series, unit, show=_as_duration(divisor))),
        "Averages over the ranks." if has_ranks else "",
    )
    if len(epochs) < 2:
        return [time_card]
    speed = [Series("rows/s", [epoch.rows_per_s for epoch in epochs], "single")]
    chart = Chart("speed", _told("rows per second", epochs, speed), _numbers(epochs), speed)
    speed_card = Card(
        "rows per second",
        [("", "single", words.number(round(epochs[-1].rows_per_s)))],
        lines(chart, from_zero=True),
        "All ranks together. The first epoch also reads the files and compiles.",
    )
    return [time_card, speed_card]


def spread(epochs: Sequence[EpochRecord]) -> Card | None:
    """Draw how far apart the fastest and the slowest rank of each epoch were."""
    found = spreads(epochs)
    if not found:
        return None
    divisor, unit = _time_unit(max(one.most_s for one in found))
    series = [
        Series("fastest", [one.least_s / divisor for one in found], "low"),
        Series("slowest", [one.most_s / divisor for one in found], "high"),
    ]
    chart = Chart(
        "spread",
        f"own work of the fastest and slowest rank in each epoch, in {unit}; the slowest is named in the table",
        [one.epoch for one in found],
        series,
        unit,
        [f"rank {one.slowest.rank}" for one in found],
        show=_as_duration(divisor),
    )
    return Card(
        "fastest and slowest rank",
        [(one.name, one.ink, "") for one in series],
        spans(chart),
        "Computing and waiting for rows, without averaging, in which ranks wait for each other.",
    )


def _as_duration(divisor: float) -> Callable[[float], str]:
    return lambda value: words.duration(value * divisor)


def _time_unit(longest_s: float) -> tuple[float, str]:
    for seconds, unit in ((3600.0, "hours"), (60.0, "minutes")):
        if longest_s >= 5 * seconds:
            return seconds, unit
    return 1.0, "seconds"
