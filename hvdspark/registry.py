"""The runs in a Store: to find one again, to compare them, and to take the best."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from hvdspark.aliases import runs_in_use
from hvdspark.errors import ParamError, StoreError, closest
from hvdspark.history import EpochRecord, read_history
from hvdspark.metrics import Mode, best_place, rises
from hvdspark.runs import HELD_OUT, RunRecord, read_record, require_run, run_folder, run_names
from hvdspark.store import Store, require_store

# Records are small, and may be far away: what counts is to ask for many at once.
_LOOKERS = 16

# Per name what each run has there; a run that has nothing is left out.
SideBySide = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class RunDetails:
    """All that there is to say of a run.

    Parameters
    ----------
    record
        What its driver noted.
    epochs
        What its ranks measured; empty where that is damaged.
    aliases
        Those that refer to it, or can be rolled back to it.
    size_bytes
        How much its folder holds.
    """

    record: RunRecord
    epochs: tuple[EpochRecord, ...]
    aliases: tuple[str, ...]
    size_bytes: int


@dataclass(frozen=True)
class Comparison:
    """How runs differ.

    Parameters
    ----------
    run_ids
        The runs, in the order in which they were asked for.
    params, versions, data
        What is not the same in all of them: by name, and by run. Names of what lies deeper have dots in them.
    metrics
        All of them, by name and by run.
    """

    run_ids: tuple[str, ...]
    params: SideBySide
    versions: SideBySide
    data: SideBySide
    metrics: SideBySide


def list_runs(store: Store) -> list[RunRecord]:
    """Return all runs of a Store, the newest first.

    A run whose record is damaged is among them, as the last, with the state ``"damaged"``.

    Raises
    ------
    ParamError
        When there is no such Store.
    StoreError
        When the Store cannot be read.
    """
    require_store(store).check_there()
    with ThreadPoolExecutor(_LOOKERS) as pool:
        found = pool.map(lambda name: _record_if_there(store, name), run_names(store))
        records = [record for record in found if record is not None]
    return sorted(records, key=_newest_first)


def show_run(store: Store, run_id: str) -> RunDetails:
    """Return what there is to know of a run.

    Raises
    ------
    ParamError
        When there is no such run (naming the closest).
    StoreError
        When the Store cannot be read.
    """
    record, epochs = require_run(store, run_id), tuple[EpochRecord, ...]()
    with contextlib.suppress(StoreError):
        epochs = read_history(store, run_id)
    return RunDetails(
        record=record,
        epochs=epochs,
        aliases=runs_in_use(store).get(run_id, ()),
        size_bytes=int(store.filesystem.du(store.path(run_folder(run_id)))),
    )


def compare_runs(store: Store, run_ids: Sequence[str]) -> Comparison:
    """Return in what runs differ.

    Parameters
    ----------
    store, run_ids
        Two runs or more.

    Raises
    ------
    ParamError
        When there are fewer, or no run of a name (naming the closest).
    StoreError
        When the Store cannot be read.
    """
    names = tuple(dict.fromkeys(run_ids))
    if len(names) < 2:
        raise ParamError(f"{list(run_ids)} are not two runs to compare; give two or more names", param="run_ids")
    records = [require_run(store, name) for name in names]
    return Comparison(
        names,
        params=_differing({record.run_id: record.params for record in records}),
        versions=_differing({record.run_id: record.versions for record in records}),
        data=_differing({record.run_id: _data_of(record) for record in records}),
        metrics=_side_by_side({record.run_id: record.measured for record in records}),
    )


def best_run(store: Store, metric: str = "val_loss", mode: Mode = "auto") -> RunRecord:
    """Return the finished run whose model is the best by a metric; of equal ones the first.

    Parameters
    ----------
    store
        Where the runs are.
    metric
        Name in the history, or ``held_out.`` and that of a metric of a job's evaluation: ``"held_out.val_loss"``.
    mode
        Whether less or more is better; ``"auto"`` goes by the name, see :class:`hvdspark.estimators.BestOf`.

    Raises
    ------
    ParamError
        When no run finished, or none has the metric (naming the closest).
    StoreError
        When the Store cannot be read.
    """
    if mode not in ("auto", "min", "max"):
        raise ParamError(f"mode='{mode}' is not known; give 'auto', 'min' or 'max'", param="mode")
    finished = [record for record in reversed(list_runs(store)) if record.state == "finished"]
    if not finished:
        raise ParamError(f"no run in {store} has finished, so none is the best", param="metric")
    known = dict.fromkeys(name for record in finished for name in record.measured)
    if metric not in known:
        raise ParamError(
            f"no finished run has the metric '{metric}'.{closest(metric, known)} There are: {', '.join(known)}",
            param="metric",
        )
    measured = [record for record in finished if math.isfinite(record.measured.get(metric, math.nan))]
    if not measured:
        raise ParamError(f"'{metric}' is NaN or infinite in all runs that have it; choose another", param="metric")
    values = [record.measured[metric] for record in measured]
    return measured[best_place(values, rising=rises(metric.removeprefix(f"{HELD_OUT}."), mode))]


def _record_if_there(store: Store, name: str) -> RunRecord | None:
    try:
        return read_record(store, name)
    except StoreError:
        if store.exists(run_folder(name)):
            raise
        return None  # removed since it was listed


def _newest_first(record: RunRecord) -> tuple[float, str]:
    return math.inf if math.isnan(record.started) else -record.started, record.run_id


def _data_of(record: RunRecord) -> dict[str, Any]:
    """Return a run's data with the columns by name, so that one that was added does not move the others."""
    columns = record.data.get("columns")
    if not isinstance(columns, list) or not all(isinstance(column, dict) and "name" in column for column in columns):
        return dict(record.data)
    by_name = {column["name"]: {key: column[key] for key in column if key != "name"} for column in columns}
    return {**record.data, "columns": by_name}


def _differing(values: Mapping[str, Mapping[str, Any]]) -> SideBySide:
    table = _side_by_side({run_id: flatten(found) for run_id, found in values.items()})
    return {
        name: row
        for name, row in table.items()
        if len(row) < len(values) or len({json.dumps(value, sort_keys=True) for value in row.values()}) > 1
    }


def _side_by_side(values: Mapping[str, Mapping[str, Any]]) -> SideBySide:
    names = dict.fromkeys(name for found in values.values() for name in found)
    return {name: {run_id: found[name] for run_id, found in values.items() if name in found} for name in names}


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return values of nested mappings by names with dots in them; lists stay as they are."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
