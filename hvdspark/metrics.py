"""Which way a metric is better, and which epoch is the best by it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

Mode = Literal["auto", "min", "max"]

_RISING = ("acc", "auc", "precision", "recall", "f1", "fbeta", "r2", "iou", "dice", "top_k", "cosine_similarity")


def rises(metric: str, mode: Mode = "auto") -> bool:
    """Whether more of a metric is better.

    Parameters
    ----------
    metric
        Its name in the history, such as ``"val_loss"``.
    mode
        ``"min"`` and ``"max"`` say it; ``"auto"`` takes accuracies, AUC and the like as rising, losses and errors and
        all else as falling.
    """
    if mode != "auto":
        return mode == "max"
    return not metric.endswith(("loss", "error")) and any(part in metric for part in _RISING)


def improves(value: float, best: float, *, rising: bool) -> bool:
    """Whether a value takes the place of the best so far; anything takes that of NaN."""
    return math.isnan(best) or (value > best if rising else value < best)


def best_place(values: Sequence[float], *, rising: bool) -> int:
    """Return the index of the best value, of equal ones the first; where all are NaN, the last."""
    best = 0
    for place, value in enumerate(values):
        if improves(value, values[best], rising=rising):
            best = place
    return best
