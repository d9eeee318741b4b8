"""What has become of a run: a record in its folder, which its driver writes and anybody can read.

A driver that is killed writes nothing more. So a record that says ``running`` is believed only as long as its driver
holds the run's lease.
"""

from __future__ import annotations

import contextlib
import json
import logging
import posixpath
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from hvdspark.errors import HvdSparkError, StageLostError, StoreError
from hvdspark.lease import held, is_held
from hvdspark.store import Store

RUNS = "runs"

_RECORD = "run.json"
_LEASE = "driver"

logger = logging.getLogger(__name__)

State = Literal["running", "finished", "failed", "interrupted"]


@dataclass(frozen=True)
class RunRecord:
    """What is known of a run.

    Parameters
    ----------
    run_id
        Its name.
    state
        ``"running"``; ``"finished"``; ``"failed"``, for the reason that ``cause`` tells; or ``"interrupted"``: its
        driver is gone, was stopped by the user, or Spark's job was cancelled.
    started, ended
        Seconds since the epoch, by the driver's clock. For a run that goes on after an interruption, when it did.
    cause
        The first line of the error.
    """

    run_id: str
    state: State
    started: float
    ended: float | None = None
    cause: str | None = None


def run_folder(run_id: str) -> str:
    """Return the folder of a run, relative to the Store."""
    return posixpath.join(RUNS, run_id)


def log_folder(run_id: str, attempt: int = 1) -> str:
    """Return where the ranks of an attempt, counted from 1, write their logs."""
    first = posixpath.join(run_folder(run_id), "logs")
    return first if attempt == 1 else f"{first}/attempt-{attempt}"


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
        ``None`` where there is no such run, or it has not begun to train.
    """
    values: dict[str, Any] | None = store.read_json(_place(run_id))
    if values is None:
        return None
    record = RunRecord(**values)
    if record.state == "running" and not is_in_progress(store, run_id):
        return replace(record, state="interrupted", cause="its driver is gone")
    return record


def is_in_progress(store: Store, run_id: str) -> bool:
    """Whether a driver is at the run."""
    return is_held(store, run_folder(run_id), _LEASE)


@contextlib.contextmanager
def in_progress(store: Store, run_id: str) -> Iterator[None]:
    """Hold the run for the time of a block, so that no other driver begins with it; raises :class:`StoreError`."""
    with held(store, run_folder(run_id), _LEASE):
        yield


@contextlib.contextmanager
def recorded(store: Store, run_id: str) -> Iterator[None]:
    """Keep a record of what becomes of a run in the block; errors of the block go through."""
    record = RunRecord(run_id, "running", time.time())
    _write(store, record)
    # A Store that goes meanwhile is not made anew for a note.
    store = store.within(run_folder(run_id))
    try:
        yield
    except BaseException as exc:
        state: State = "interrupted" if _is_interruption(exc) else "failed"
        _write(store, replace(record, state=state, ended=time.time(), cause=_first_line(exc)))
        raise
    _write(store, replace(record, state="finished", ended=time.time()))


def _is_interruption(exc: BaseException) -> bool:
    # Spark's own way of Ctrl-C is to cancel all jobs.
    is_cancelled = isinstance(exc, StageLostError) and not exc.is_passing
    return is_cancelled or not isinstance(exc, Exception)


def _first_line(exc: BaseException) -> str:
    text = str(exc).strip().partition("\n")[0]
    return text if isinstance(exc, HvdSparkError) else f"{type(exc).__name__}: {text}".rstrip(": ")


def _write(store: Store, record: RunRecord) -> None:
    try:
        store.publish_bytes(json.dumps(asdict(record)).encode(), _place(record.run_id))
    except (OSError, StoreError) as exc:
        # What is trained is worth more than the note of it.
        logger.warning("cannot record that %s is %s: %s", record.run_id, record.state, exc)


def _place(run_id: str) -> str:
    return posixpath.join(run_folder(run_id), _RECORD)
