"""Metrics over the rows of all ranks.

Keras' metrics keep sums: totals and counts, confusion matrices, squared errors. Adding those up over the ranks and
taking the result of the sums gives what one process would have seen, also for metrics such as AUC or a root mean
squared error, of which an average over ranks would be wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from hvdspark.worker.session import Session


def global_metrics(model: keras.Model, session: Session, rows: int, name: str) -> dict[str, float]:
    """Return the model's metrics over the rows of all ranks; every rank gets the same.

    Parameters
    ----------
    model
        A compiled model whose metrics hold this rank's state. The state is used up: reset the metrics afterwards.
    session
        The Horovod session.
    rows
        Rows that this rank's state stands for.
    name
        Name of the collective, the same on all ranks.

    Notes
    -----
    A metric class of the user's own that derives from nothing but ``keras.metrics.Metric`` may keep anything; of such
    a one the results are averaged over the ranks, weighted by rows.
    """
    local = current_metrics(model)
    variables = [variable for metric in model.metrics for variable in metric.variables]
    states = [np.asarray(variable, dtype=np.float64).reshape(-1) for variable in variables]
    own = [key for key in local if _is_own_kind(key, model)]
    weighted = np.array([local[key] * rows if rows else 0.0 for key in own] + [float(rows)])
    sums = session.sum(np.concatenate([*states, weighted]), name)
    start = 0
    for variable, state in zip(variables, states, strict=True):
        variable.assign(sums[start : start + len(state)].reshape(variable.shape).astype(variable.dtype))
        start += len(state)
    results = current_metrics(model)
    totals = sums[start:]
    results.update({key: float(total / totals[-1]) for key, total in zip(own, totals[:-1], strict=True)})
    return results


def current_metrics(model: keras.Model) -> dict[str, float]:
    """Return this rank's metrics as numbers; those of several values are left out, as a history does not take them."""
    values = {key: np.asarray(value) for key, value in model.get_metrics_result().items()}
    return {key: float(value.item()) for key, value in values.items() if value.size == 1}


def _is_own_kind(key: str, model: keras.Model) -> bool:
    """Whether a result comes from a metric whose state may not be added up."""
    return any(
        not _adds_up(metric) and (key == metric.name or key.endswith(f"_{metric.name}")) for metric in _leaves(model)
    )


def _adds_up(metric: keras.metrics.Metric) -> bool:
    """Whether a metric is one of Keras' own, or derives from one and so from its way of keeping sums."""
    bases = set(type(metric).__mro__) - set(keras.metrics.Metric.__mro__)
    return any(cls.__module__.startswith("keras.") for cls in bases)


def _leaves(model: keras.Model) -> Iterator[Any]:
    """Yield the single metrics; Keras keeps those given to ``compile`` in a container of its own."""
    for metric in model.metrics:
        inner = getattr(metric, "metrics", None)
        yield from inner if inner else (metric,)
