"""What stands out in a run, and what to do about it: the sentences at the top of a report."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from hvdspark.history import EpochRecord
from hvdspark.metrics import best_place
from hvdspark.report import words
from hvdspark.report.times import Part, RankMean, lags, mean, usual
from hvdspark.runs import RunRecord

# From these on something is worth a sentence. They are shares of the training steps' time, but for the last ones.
_WAIT, _AVERAGING = 0.10, 0.40
_RISEN = 0.02  # of the validation loss since its best epoch
_FALLING = 0.01  # of the validation loss in the last epoch
_OVERHEAD = 0.5  # of the whole run, before the first step


@dataclass(frozen=True)
class Remark:
    """A sentence about a run.

    Parameters
    ----------
    kind
        ``"look"`` where something could be better; ``"good"`` where it is as it should be.
    what
        What was seen, with its numbers.
    advice
        What to do about it.
    """

    kind: Literal["look", "good"]
    what: str
    advice: str = ""


def findings(
    record: RunRecord, epochs: Sequence[EpochRecord], parts: Sequence[Part], ranks: Sequence[RankMean]
) -> list[Remark]:
    """Return what stands out, what could be better first.

    Parameters
    ----------
    record, epochs
        What is known of the run.
    parts, ranks
        Where its time went; see :mod:`hvdspark.report.times`.
    """
    found = [_not_finite(epochs), _learning(record, epochs), _waiting(epochs), _averaging(epochs)]
    found += [_lagging(ranks, epochs), _overhead(record, parts)]
    told = [finding for finding in found if finding is not None]
    return sorted(told, key=lambda finding: finding.kind == "good")


def _not_finite(epochs: Sequence[EpochRecord]) -> Remark | None:
    bad = [
        epoch.epoch
        for epoch in epochs
        if not all(math.isfinite(epoch.metrics.get(name, 0.0)) for name in ("loss", "val_loss"))
    ]
    if not bad:
        return None
    where = f"epoch {bad[0]}" if len(bad) == 1 else f"{words.count(len(bad), 'epoch')}, from epoch {bad[0]} on"
    return Remark(
        "look",
        f"The loss was not finite in {where}.",
        "Lower the learning rate, clip gradients (the optimizer's clipnorm), or look for wild values in the rows.",
    )


def _learning(record: RunRecord, epochs: Sequence[EpochRecord]) -> Remark | None:
    """Say where the validation loss turned, or that it has not."""
    losses = [(epoch.epoch, epoch.metrics["val_loss"]) for epoch in epochs if "val_loss" in epoch.metrics]
    losses = [(epoch, loss) for epoch, loss in losses if math.isfinite(loss)]
    if len(losses) < 2:
        return None
    best = best_place([loss for _, loss in losses], rising=False)
    (epoch, lowest), (_, before), (_, last) = losses[best], losses[-2], losses[-1]
    if best < len(losses) - 2 and last > lowest * (1 + _RISEN) > 0:
        advice = "Keep the best epoch's model with checkpoint_callback=BestOf('val_loss'), or stop with EarlyStopping."
        if record.params.get("checkpoint_callback"):
            advice = "The model of the best epoch was kept; fewer epochs, or EarlyStopping, save the time."
        risen = words.share(last / lowest - 1)
        return Remark("look", f"Validation loss was lowest in epoch {epoch} and has risen by {risen} since.", advice)
    if record.state == "finished" and best == len(losses) - 1 and 0 < last < before * (1 - _FALLING):
        fall = words.share(1 - last / before)
        return Remark("look", f"Validation loss still fell by {fall} in the last epoch.", "More epochs may help.")
    return None


def _step_shares(epochs: Sequence[EpochRecord]) -> tuple[float, float] | None:
    """Return the shares of the steps' time that went into waiting for rows and into averaging."""
    told = [epoch for epoch in usual(epochs) if epoch.ranks]
    wait, averaging, compute = (
        sum(mean(epoch, what) for epoch in told) for what in ("data_wait_s", "allreduce_s", "compute_s")
    )
    whole = wait + averaging + compute
    return (wait / whole, averaging / whole) if whole > 0 else None


def _waiting(epochs: Sequence[EpochRecord]) -> Remark | None:
    shares = _step_shares(epochs)
    if shares is None:
        return None
    if shares[0] < _WAIT:
        return Remark("good", f"Steps waited for rows {words.share(shares[0])} of their time: reading keeps up.")
    return Remark(
        "look",
        f"Steps waited for rows {words.share(shares[0])} of their time: reading is the bottleneck.",
        "Raise train_reader_num_workers, give the executors memory so that the rows fit into the cache, or a faster"
        " disk for cache='disk'.",
    )


def _averaging(epochs: Sequence[EpochRecord]) -> Remark | None:
    shares = _step_shares(epochs)
    if shares is None or len(epochs[-1].ranks) < 2 or shares[1] < _AVERAGING:
        return None
    return Remark(
        "look",
        f"Averaging gradients took {words.share(shares[1])} of the steps' time.",
        "A larger batch_size averages less often, as does backward_passes_per_step; gradient_compression='fp16' sends"
        " half. A small model may train as fast on fewer ranks.",
    )


def _lagging(ranks: Sequence[RankMean], epochs: Sequence[EpochRecord]) -> Remark | None:
    if len(ranks) < 2:
        return None
    slowest = max(ranks, key=lambda rank: rank.own_s)
    if not lags(slowest, ranks):
        return Remark("good", f"The {len(ranks)} ranks are about equally fast.")
    others = statistics.median(rank.own_s for rank in ranks if rank is not slowest)
    waits = slowest.wait_s - statistics.median(rank.wait_s for rank in ranks if rank is not slowest)
    is_reading = waits > (slowest.own_s - others) / 2
    why = "it waits for its rows: look at its disk and network" if is_reading else "see what else runs on its host"
    return Remark(
        "look",
        f"{slowest.name.capitalize()} took {words.share(slowest.own_s / others - 1)} longer for its own work than the"
        f" others, and was the slowest in {slowest.slowest_in} of {words.count(len(epochs), 'epoch')}.",
        f"All ranks wait for the slowest; {why}.",
    )


def _overhead(record: RunRecord, parts: Sequence[Part]) -> Remark | None:
    whole = sum(part.seconds for part in parts)
    before = sum(part.seconds for part in parts if part.ink.startswith("setup") and part.name != "publish")
    if record.state != "finished" or whole <= 0 or before < whole * _OVERHEAD:
        return None
    longest = max((part for part in parts if part.ink.startswith("setup")), key=lambda part: part.seconds)
    return Remark(
        "look",
        f"{words.share(before / whole)} of the time went before the first step, most of it into"
        f" {longest.name} ({words.duration(longest.seconds)}).",
        "A later fit on the same rows finds the dataset written, and the warm pool has loaded TensorFlow by then.",
    )
