"""What a report says, section by section, as plain values for its template."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hvdspark.history import EpochRecord, Progress
from hvdspark.metrics import best_place
from hvdspark.report import charts, words
from hvdspark.report.findings import findings
from hvdspark.report.times import Part, RankMean, breakdown, by_rank, lags, spreads, usual
from hvdspark.report.words import NONE
from hvdspark.runs import Attempt, RunRecord

# What most readers look for first; the others are behind a fold.
_FIRST_PARAMS = (
    *("num_proc", "batch_size", "epochs", "optimizer", "learning_rate", "loss", "metrics", "validation"),
    *("feature_cols", "label_cols", "random_seed"),
)
_FIRST_CURVES = 6
_FEW = 12  # rows that need no fold

_STATES = {
    "running": ("Running", "●"),
    "finished": ("Finished", "✓"),
    "failed": ("Failed", "✕"),
    "interrupted": ("Interrupted", "■"),
    "damaged": ("Record damaged", "?"),
}


@dataclass(frozen=True)
class Fact:
    """One of the large numbers at the top."""

    label: str
    value: str
    detail: str = ""


@dataclass(frozen=True)
class Slice:
    """A part of a bar, with its share of the bar's width in percent."""

    name: str
    meaning: str
    ink: str
    seconds: str
    percent: float
    share: str


@dataclass(frozen=True)
class Bar:
    """A rank's row: a bar, and its numbers."""

    name: str
    detail: str
    parts: Sequence[Slice]
    values: Sequence[str]
    is_slowest: bool
    is_lagging: bool


def sections(
    record: RunRecord,
    epochs: Sequence[EpochRecord],
    progress: Progress | None,
    place: str,
    troubles: Sequence[str] = (),
) -> dict[str, Any]:
    """Return what the template shows, by name.

    Parameters
    ----------
    record, epochs, progress
        What is in the run's folder, as far as it is there.
    place
        The address of that folder.
    troubles
        What could not be read of it.
    """
    now = time.time()
    parts = breakdown(record, epochs)
    ranks = by_rank(epochs)
    label, icon = _STATES.get(record.state, (record.state, "?"))
    first_params, more_params = _params(record.params)
    curves = charts.curves(record, epochs)
    return {
        "record": record,
        "place": place,
        "troubles": troubles,
        "state": {"label": label, "icon": icon},
        "when": _when(record, now),
        "facts": _facts(record, epochs, progress, parts),
        "progress": _progress(record, progress),
        "attempts": _attempts(record),
        "findings": findings(record, epochs, parts, ranks),
        "curves": curves[:_FIRST_CURVES],
        "more_curves": curves[_FIRST_CURVES:],
        "parts": _slices(parts, sum(part.seconds for part in parts)),
        "parts_label": ", ".join(f"{part.name} {words.duration(part.seconds)}" for part in parts),
        "pace": charts.pace(epochs),
        "ranks": _rank_bars(ranks, len(epochs)) if len(ranks) > 1 else [],
        "spread": charts.spread(epochs),
        "spreads": [
            {
                "epoch": one.epoch,
                "least": words.duration(one.least_s),
                "most": words.duration(one.most_s),
                "which": f"rank {one.slowest.rank}",
            }
            for one in spreads(epochs)
        ],
        "rank_legend": [(name, ink, "") for name, ink in charts.STEP_PARTS],
        "table": _table(epochs),
        "data": _data(record.data),
        "columns": [_column(column) for column in record.data.get("columns") or ()],
        "first_params": first_params,
        "more_params": more_params,
        "versions": sorted(record.versions.items()),
        "hosts": _hosts(record) if len(ranks) < 2 else [],
        "artefacts": sorted(record.artefacts.items()),
        "held_out": [(name, words.number(found)) for name, found in record.held_out.items()],
        "promoted": {None: "", True: "The model was promoted", False: "The model was not promoted"}[record.promoted],
        "written": words.moment(now),
    }


def _when(record: RunRecord, now: float) -> str:
    began = min(record.started, record.began)
    end = record.ended if record.ended is not None else now if record.state == "running" else None
    texts = [record.kind, f"began {words.moment(began)}"]
    if end is not None:
        verb = "for" if record.state == "running" else "took"
        texts.append(f"{verb} {words.duration(max(0.0, end - began))}")
    return " · ".join(text for text in texts if text)


def _facts(
    record: RunRecord, epochs: Sequence[EpochRecord], progress: Progress | None, parts: Sequence[Part]
) -> list[Fact]:
    """Return the large numbers at the top."""
    facts = [*_result(record, epochs)]
    if epochs:
        wanted = record.params.get("epochs") or (progress.epochs if progress else None)
        done = epochs[-1].epoch
        facts.append(Fact("epochs", f"{done} of {wanted}" if wanted else str(done), _per_epoch(epochs)))
        speed = statistics.median(epoch.rows_per_s for epoch in usual(epochs))
        facts.append(Fact("rows per second", words.number(round(speed)), _who(record, epochs)))
    whole = sum(part.seconds for part in parts)
    if whole > 0:
        before = sum(part.seconds for part in parts if part.ink.startswith("setup"))
        detail = f"{words.share(1 - before / whole)} of it training" if record.phases else "in training"
        facts.append(Fact("time", words.duration(whole), detail))
    return facts


def _result(record: RunRecord, epochs: Sequence[EpochRecord]) -> list[Fact]:
    """Show the loss of the model that was kept, or the best so far."""
    name = next((name for name in ("val_loss", "loss") if any(name in epoch.metrics for epoch in epochs)), None)
    label = {"val_loss": "validation loss", "loss": "training loss"}
    if name is None:
        known = [(key, record.metrics[key]) for key in label if record.metrics.get(key) is not None]
        return [Fact(label[key], words.number(value)) for key, value in known[:1]]
    place = charts.marked(record, epochs)
    if place is None:
        values = [epoch.metrics.get(name, math.nan) for epoch in epochs]
        place = best_place(values, rising=False)
    value = epochs[place].metrics.get(name, math.nan)
    is_kept = record.state == "finished" and epochs[place].epoch == record.epoch
    what = "the model kept" if is_kept else "the lowest"
    return [Fact(label[name], words.number(value), f"epoch {epochs[place].epoch}, {what}")]


def _per_epoch(epochs: Sequence[EpochRecord]) -> str:
    return f"{words.duration(statistics.median(epoch.seconds for epoch in usual(epochs)))} each"


def _who(record: RunRecord, epochs: Sequence[EpochRecord]) -> str:
    places = epochs[-1].ranks or record.hosts
    if not places:
        return ""
    hosts = len({place.host for place in places})
    return f"{words.count(len(places), 'rank')} on {words.count(hosts, 'host')}"


def _progress(record: RunRecord, now: Progress | None) -> dict[str, Any] | None:
    if record.state == "finished" or now is None or not now.epochs or not now.steps:
        return None
    done = (now.epoch - 1 + min(1.0, now.step / now.steps)) / now.epochs
    where = f"epoch {now.epoch} of {now.epochs}, step {now.step:,} of {now.steps:,}"
    return {"percent": round(100 * done, 3), "where": where, "time": words.moment(now.time)}


def _attempts(record: RunRecord) -> list[dict[str, str]]:
    """Show the launches where there was more than the one that did it."""
    if len(record.attempts) < 2 and not any(attempt.cause for attempt in record.attempts):
        return []
    return [_attempt(attempt) for attempt in record.attempts]


def _attempt(attempt: Attempt) -> dict[str, str]:
    what = attempt.cause or ("It was left as it was." if attempt.ended is None else "It went through.")
    facts = [f"Began {words.moment(attempt.started)}"]
    if attempt.ranks:
        facts.append(words.count(attempt.ranks, "rank"))
    if attempt.ended is not None:
        facts.append(f"ended after {words.duration(attempt.ended - attempt.started)}")
    return {"what": what, "when": ", ".join(facts)}


def _slices(parts: Sequence[Part], whole: float) -> list[Slice]:
    return [
        Slice(
            part.name,
            part.meaning,
            part.ink,
            words.duration(part.seconds),
            round(100 * part.seconds / whole, 3) if whole > 0 else 0.0,
            words.share(part.seconds / whole) if whole > 0 else "",
        )
        for part in parts
    ]


def _rank_bars(ranks: Sequence[RankMean], epochs: int) -> list[Bar]:
    longest = max(rank.own_s + rank.allreduce_s for rank in ranks)
    slowest = max(ranks, key=lambda rank: rank.own_s)
    return [
        Bar(
            f"rank {rank.rank}",
            rank.host,
            _slices([Part(name, "", seconds, ink) for (name, ink), seconds in _steps(rank)], longest),
            [
                *(words.duration(seconds) for _, seconds in _steps(rank)),
                words.duration(rank.own_s),
                f"{rank.slowest_in} of {epochs}",
            ],
            is_slowest=rank is slowest,
            is_lagging=lags(rank, ranks),
        )
        for rank in ranks
    ]


def _steps(rank: RankMean) -> list[tuple[tuple[str, str], float]]:
    return list(zip(charts.STEP_PARTS, (rank.wait_s, rank.compute_s, rank.allreduce_s), strict=True))


def _table(epochs: Sequence[EpochRecord]) -> dict[str, Any]:
    """Show every number of every epoch, which is also for readers who cannot see the charts."""
    names = charts.metric_names(epochs)
    return {
        "names": [*names, "took", "rows/s", "learning rate"],
        "rows": [
            [
                str(epoch.epoch),
                *(words.number(epoch.metrics[name]) if name in epoch.metrics else NONE for name in names),
                words.duration(epoch.seconds),
                words.number(round(epoch.rows_per_s)),
                NONE if epoch.learning_rate is None else words.rate(epoch.learning_rate),
            ]
            for epoch in epochs
        ],
        "is_long": len(epochs) > _FEW,
    }


def _data(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    labels = {
        "rows": "rows trained on",
        "val_rows": "rows validated on",
        "source": "source",
        "dataset": "dataset in the Store",
        "fingerprint": "fingerprint",
    }
    shown = []
    for name, found in data.items():
        if name != "columns" and found is not None:
            text = f"{found:,}" if isinstance(found, int) and not isinstance(found, bool) else words.value(found)
            shown.append((labels.get(name, name), text))
    order = list(labels.values())
    return sorted(shown, key=lambda item: order.index(item[0]) if item[0] in order else len(order))


def _column(column: Any) -> str:
    """Describe a column by its name, type and shape, as far as they are known."""
    if not isinstance(column, Mapping):
        return words.value(column)
    shape = column.get("shape")
    sizes = " x ".join(str(size) for size in shape) if isinstance(shape, list) and shape != [1] else ""
    kind = " ".join(text for text in (words.value(column.get("dtype", "")), sizes) if text)
    return words.value(column.get("name", "?")) + (f": {kind}" if kind else "")


def _params(params: Mapping[str, Any]) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    texts = {name: NONE if found is None else words.value(found) for name, found in params.items()}
    if len(texts) <= _FEW:
        return sorted(texts.items()), []
    first = [(name, texts[name]) for name in _FIRST_PARAMS if params.get(name) is not None]
    shown = {name for name, _ in first}
    return first, sorted((name, text) for name, text in texts.items() if name not in shown)


def _hosts(record: RunRecord) -> list[tuple[str, str]]:
    return [(f"rank {place.rank}", place.host) for place in record.hosts]
