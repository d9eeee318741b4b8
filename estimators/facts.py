"""What the record of a run says of a fit: its parameters, its rows, and what came out; all of it as JSON values."""

from __future__ import annotations

import posixpath
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hvdspark.data.planning import FitDraft
from hvdspark.layout import TENSORBOARD, TIMELINE
from hvdspark.metrics import best_place
from hvdspark.plan import ColumnSpec, FitPlan, TrainResult
from hvdspark.runs import run_folder
from hvdspark.store import Store
from hvdspark.worker.checkpoint import BEST, CHECKPOINTS, BestOf

if TYPE_CHECKING:
    from hvdspark.estimators.base import HorovodEstimator
    from hvdspark.estimators.sources import Work

# Values of these may be secrets: a record says which there are.
_NAMES_ONLY = ("backend_env",)

# Parameters that say how and where ranks run, and what is shown and kept of it. All others decide what comes out, so
# that a run which goes on must have them as it began.
OPERATIONAL = frozenset(
    {
        *("num_proc", "min_proc", "max_restarts", "start_timeout", "stall_timeout_s", "warm_pool", "use_gpu"),
        *("controller", "nics", "rdma", "allow_insecure_transport", "backend_env", "allreduce", "on_nan"),
        *("train_reader_num_workers", "cache", "inmemory_cache_all", "keep_dataset", "val_batch_size"),
        *("checkpoint_steps", "keep_checkpoints", "verbose", "tensorboard", "timeline", "mlflow", "run_id"),
    }
)
# Parameters of what a model does with rows once it is trained.
SCORING = frozenset({"output_cols", "output_types", "transform_batch_size"})


def params_of(estimator: HorovodEstimator) -> dict[str, Any]:
    """Return an estimator's parameters and attributes, defaults included; of what may be secret the names alone."""
    names = [param.name for param in estimator.params]
    values = {name: estimator._value(name) for name in names if estimator._value(name) is not None}
    for name in _NAMES_ONLY:
        if name in values:
            values[name] = sorted(values[name])
    return {**values, **estimator._attribute_facts()}


def data_facts(source: Mapping[str, Any], draft: FitDraft, work: Work | None = None) -> dict[str, Any]:
    """Describe the rows of a fit, as far as they are known.

    Parameters
    ----------
    source
        What their source says.
    draft
        The fit before they are counted.
    work
        After that; rows that come with the tasks are counted by these.
    """
    if not isinstance(work, FitPlan):
        return {**source, "columns": [_column_facts(column) for column in draft.columns]}
    return {
        **source,
        "rows": work.train.rows,
        "val_rows": 0 if work.val is None else work.val.rows,
        "columns": [_column_facts(column) for column in work.columns],
    }


def artefacts_of(store: Store, result: TrainResult, run_id: str) -> dict[str, str]:
    """Return the paths in the Store of what a training has made, by kind."""
    folder = run_folder(run_id)
    found = {"model": result.model_path}
    for name in store.list(folder, CHECKPOINTS):
        if name.startswith(f"{BEST}."):
            found["best_checkpoint"] = posixpath.join(folder, CHECKPOINTS, name)
    return found | {name: posixpath.join(folder, name) for name in (TENSORBOARD, TIMELINE) if store.list(folder, name)}


def kept_metrics(history: Mapping[str, Sequence[float]], best_of: BestOf | None) -> tuple[dict[str, float], int | None]:
    """Return the metrics of the epoch whose model was kept, and its number, counted from 1.

    Parameters
    ----------
    history
        Per metric the value of each epoch.
    best_of
        Which epoch was kept; ``None`` for the last.
    """
    epochs = max(map(len, history.values()), default=0)
    if not epochs:
        return {}, None
    place = epochs - 1
    if best_of is not None and best_of.monitor in history:
        place = best_place(history[best_of.monitor], rising=best_of.rising)
    return {name: float(values[place]) for name, values in history.items() if place < len(values)}, place + 1


def _column_facts(column: ColumnSpec) -> dict[str, Any]:
    facts = {"name": column.name, "kind": column.kind, "dtype": column.dtype}
    shape = column.row_shape
    return facts if shape is None else {**facts, "shape": list(shape)}
