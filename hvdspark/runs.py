"""What has become of a run: a record in its folder, which its driver writes and anybody can read.

A driver that is killed writes nothing more. So a record that says ``running`` is believed only as long as somebody
holds a lease on the run: the driver that trains, or the job around the training. And what the ranks have left in the
folder by themselves is read with it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from hvdspark.errors import ParamError, RunInProgressError, StoreError, closest
from hvdspark.history import read_history
from hvdspark.layout import RUNS as RUNS
from hvdspark.layout import run_folder as run_folder
from hvdspark.lease import held_alone, is_held
from hvdspark.plain import finite_only, numbers
from hvdspark.store import Store, require_store

RECORD, LAUNCH = "run.json", "launch.json"
# Of the trained model's file, without the suffix of its format.
MODEL = "model"
# What a job keeps in its run's folder: the fitted stages before the training, and all stages with the model.
PREPARATION, PIPELINE = "preparation", "pipeline"
# What it came to, and the notes by which it goes on.
RESULT, NOTES = "result.json", "job.json"

# The field of a record, and what goes before the names of its metrics where those of the training are too.
HELD_OUT = "held_out"

# Says in the place of a record that the run is no longer one, and that what is left of it has to go.
REMOVED = b'{"removed": true}'

# What ended an attempt whose driver said nothing of it.
GONE = "its driver is gone"

# What leases on a run are for. Only one driver trains or removes it; a job holds it from its beginning to its end.
_DRIVER, JOB = "driver", "job"

# Two fits that begin at once see each other, and one of them goes on within moments.
_CLAIM_S = 2.0

# "damaged" is never written: it is what a reader says of a record that makes no sense.
State = Literal["running", "finished", "failed", "interrupted", "damaged"]


@dataclass(frozen=True)
class Attempt:
    """One launch of the ranks.

    Parameters
    ----------
    started, ended
        Seconds since the epoch, by the driver's clock.
    cause
        The first line of the error that ended it; ``None`` where nothing did.
    ranks
        How many there were.
    noticed
        When the failure of a rank at its work was noticed, by the clock of its host; ``ended`` is when the driver was
        through with the launch. ``None`` where no rank failed so, or its task was lost with it.
    """

    started: float
    ended: float | None = None
    cause: str | None = None
    ranks: int | None = None
    noticed: float | None = None


@dataclass(frozen=True)
class RankPlace:
    """Where a rank ran.

    Parameters
    ----------
    rank, local_rank
        Its number among all, and among those of its host.
    host
        Name of the host, as Spark knows it.
    """

    rank: int
    host: str
    local_rank: int


@dataclass(frozen=True)
class RunRecord:
    """What is known of a run.

    Parameters
    ----------
    run_id
        Its name.
    state
        ``"running"``; ``"finished"``; ``"failed"``, for the reason that ``cause`` tells; ``"interrupted"``: its
        driver is gone, was stopped by the user, or Spark's job was cancelled; or ``"damaged"``: its record makes no
        sense, and only the name is known.
    started, ended
        Seconds since the epoch, by the driver's clock. For a run that goes on after an interruption, when it did; its
        first attempt tells when it began.
    cause
        The first line of the error.
    kind
        What trained, such as ``"keras"``.
    params
        The estimator's parameters as JSON values; of storage options and environment variables the names alone.
    versions
        Of the packages on the driver.
    data
        ``source``, ``fingerprint`` (``None`` where nobody can tell), ``dataset`` (folder in the Store), ``rows``,
        ``val_rows`` and ``columns``, as far as they are known.
    hosts
        Where each rank ran in the last attempt.
    network
        By what the ranks met and talked in the last attempt, and what NCCL, UCX and Open MPI were told on the first
        one's host, as far as the user's own variables left that to this library.
    phases
        Seconds that each phase took when it was last gone through.
    artefacts
        What the run made, by kind, as far as it made it: paths in the Store of the ``"model"``, the
        ``"best_checkpoint"``, and the folders ``"tensorboard"`` and ``"timeline"``; the address of the ``"pipeline"``
        that a job saved.
    attempts
        All launches of the ranks, those before an interruption too.
    metrics
        Those of the model that was kept; of a run that has not finished, of its last epoch. NaN where they were not
        finite.
    epoch
        The epoch, counted from 1, that ``metrics`` are of: the last one, unless the estimator keeps the best.
    mlflow_run_id
        The run in MLflow that it was logged to.
    held_out
        Metrics of the rows that a job held out of the training, by the names that ``promote_if`` knows; NaN where they
        were not finite.
    promoted, decision
        Whether a job promoted the model, and the numbers by which it decided; ``None`` where there was nothing to
        decide.
    """

    run_id: str
    state: State
    started: float
    ended: float | None = None
    cause: str | None = None
    kind: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    hosts: tuple[RankPlace, ...] = ()
    network: str = ""
    phases: Mapping[str, float] = field(default_factory=dict)
    artefacts: Mapping[str, str] = field(default_factory=dict)
    attempts: tuple[Attempt, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    epoch: int | None = None
    mlflow_run_id: str | None = None
    held_out: Mapping[str, float] = field(default_factory=dict)
    promoted: bool | None = None
    decision: str | None = None

    @property
    def measured(self) -> dict[str, float]:
        """All metrics, those of the held-out rows with ``held_out.`` before their names."""
        return {**self.metrics, **{f"{HELD_OUT}.{name}": value for name, value in self.held_out.items()}}

    @property
    def began(self) -> float:
        """When the run began, its earlier attempts included."""
        return min([self.started, *(attempt.started for attempt in self.attempts)])

    def to_json(self) -> dict[str, Any]:
        """Describe it by JSON values; a number that is not finite becomes ``None``, because JSON has none."""
        plain: dict[str, Any] = finite_only(asdict(self))
        return plain


def log_folder(run_id: str, attempt: int = 1) -> str:
    """Return where the ranks of an attempt, counted from 1, write their logs."""
    first = posixpath.join(run_folder(run_id), "logs")
    return first if attempt == 1 else f"{first}/attempt-{attempt}"


def published_model(store: Store, run_id: str) -> str | None:
    """Return the path, relative to the Store, of the model that a run has come to; ``None`` before it has."""
    folder = run_folder(run_id)
    names = [name for name in store.list(folder) if name.startswith(f"{MODEL}.")]
    return posixpath.join(folder, names[0]) if names else None


def next_attempt(store: Store, run_id: str) -> int:
    """Return the number of a run's next attempt: the logs of those before it are kept."""
    names = store.list(log_folder(run_id))
    return (
        1
        + len([name for name in names if name.startswith("attempt-")])
        + any(name.startswith("rank-") for name in names)
    )


def read_record(store: Store, run_id: str) -> RunRecord | None:
    """Return what has become of a run.

    Parameters
    ----------
    store, run_id
        Which one.

    Returns
    -------
    RunRecord or None
        ``None`` where there is no such run, or it is being removed. A record that makes no sense is one with the state
        ``"damaged"``; what a newer version wrote besides is left out.

    Raises
    ------
    StoreError
        When the Store cannot be read.
    """
    record = stored_record(store, run_id)
    if record is None or record.state in ("finished", "failed", "damaged"):
        return record
    if record.state == "running" and not is_in_progress(store, run_id):
        record = closed(replace(record, state="interrupted", cause=GONE), None)
    return with_traces(store, record)


def require_run(store: Store, run_id: str) -> RunRecord:
    """Return the record of a run; raises :class:`ParamError` where there is none, naming the closest."""
    record = read_record(require_store(store), run_id)
    if record is None:
        names = run_names(store)
        if run_id in names:
            url = store.url_of(run_folder(run_id))
            found = f"the run '{run_id}' has no record: {url} has no {RECORD}, or is being removed."
        else:
            found = f"there is no run '{run_id}' in {store}.{closest(run_id, names)}"
        raise ParamError(f"{found} 'hvdspark runs list' shows those there are", param="run_id")
    return record


def run_names(store: Store) -> list[str]:
    """Return the names in the folder of runs, whatever is behind them; what cannot be a run's name is left out."""
    names = []
    for name in store.list(RUNS):
        with contextlib.suppress(ParamError):
            store.path(run_folder(name))
            names.append(name)
    return names


def is_in_progress(store: Store, run_id: str) -> bool:
    """Whether a driver is at the run: one that trains, or a job with what comes before and after that."""
    return is_held(store, run_folder(run_id))


@contextlib.contextmanager
def in_progress(store: Store, run_id: str) -> Iterator[str]:
    """Hold the run for the time of a block, so that nobody else trains or removes it.

    Yields
    ------
    str
        The lease by which it is held, see :func:`~hvdspark.lease.held`.

    Raises
    ------
    RunInProgressError
        When another holds it.
    StoreError
        When the Store cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            own = stack.enter_context(held_alone(store, run_folder(run_id), _DRIVER, _CLAIM_S))
        except StoreError as exc:
            if is_held(store, run_folder(run_id), _DRIVER):
                raise RunInProgressError(busy(run_id), run_id=run_id) from exc
            raise
        yield own


def is_removed(store: Store, run_id: str) -> bool:
    """Whether somebody has begun to remove the run, and is at it still or has died of it."""
    return store.find_bytes(record_place(run_id)) == REMOVED


def busy(run_id: str) -> str:
    """Say that another is at a run."""
    return f"run_id='{run_id}' is being trained by another fit; wait for it, or give another one"


def closed(record: RunRecord, ended: float | None, cause: str | None = GONE, noticed: float | None = None) -> RunRecord:
    """Return the record with its last attempt ended, where that had not been."""
    if not record.attempts or record.attempts[-1].ended is not None or record.attempts[-1].cause is not None:
        return record
    *before, last = record.attempts
    return replace(record, attempts=(*before, replace(last, ended=ended, cause=cause, noticed=noticed)))


def with_traces(store: Store, record: RunRecord) -> RunRecord:
    """Return the record with what the ranks left in the run's folder, where the driver has not noted that."""
    launch = store.read_json(log_folder(record.run_id, max(1, next_attempt(store, record.run_id) - 1)), LAUNCH) or {}
    if not record.hosts:
        with contextlib.suppress(KeyError, TypeError):
            record = replace(record, hosts=tuple(RankPlace(**place) for place in launch["hosts"]))
    if isinstance(launch.get("network"), str):
        record = replace(record, network=launch["network"])
    counted = {name: launch[name] for name in ("rows", "val_rows") if isinstance(launch.get(name), int)}
    if counted:
        record = replace(record, data={**record.data, **counted})
    if not record.metrics:
        # A record is worth showing though its history is damaged.
        with contextlib.suppress(StoreError):
            for epoch in read_history(store, record.run_id)[-1:]:
                record = replace(record, metrics=epoch.metrics, epoch=epoch.epoch)
    return record


def stored_record(store: Store, run_id: str) -> RunRecord | None:
    """Return a record as it was written, which of a run that is over without a word still says that it runs."""
    data = store.find_bytes(record_place(run_id))
    if data is None or data == REMOVED:
        return None
    try:
        values = json.loads(data)
        if not isinstance(values, dict):
            raise TypeError(f"it holds a {type(values).__name__}, no JSON object")
        metrics = {name: numbers(values.get(name) or {}) for name in ("metrics", HELD_OUT)}
        return _record_from({**values, "run_id": run_id, **metrics})
    except (ValueError, TypeError, AttributeError) as exc:
        reason = " ".join(str(exc).split())[:200]
        return RunRecord(run_id, "damaged", math.nan, cause=f"{RECORD} makes no sense: {reason}")


def _record_from(values: Mapping[str, Any]) -> RunRecord:
    record: RunRecord = _reader().validate_python(values)
    return record


@functools.cache
def _reader() -> Any:
    # Imported here: the ranks need the names of folders only.
    from pydantic import TypeAdapter

    return TypeAdapter(RunRecord)


def record_place(run_id: str) -> str:
    """Return where a run's record is, relative to the Store."""
    return posixpath.join(run_folder(run_id), RECORD)
