"""Keeps the record of a run: what its driver knows of it, from when it begins until it ends, however it ends."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from hvdspark.errors import HvdSparkError, StageLostError, StoreError, WorkerFailedError, telling_line, text_of
from hvdspark.plain import to_json
from hvdspark.plan import RankContext
from hvdspark.runs import (
    GONE,
    LAUNCH,
    Attempt,
    RankPlace,
    RunRecord,
    State,
    closed,
    record_place,
    run_folder,
    stored_record,
    with_traces,
)
from hvdspark.store import Store

logger = logging.getLogger(__name__)


class Recording:
    """The record of a run that is under way.

    Parameters
    ----------
    store
        Where it is published; what cannot be written is only logged.
    record
        How it begins.
    """

    def __init__(self, store: Store, record: RunRecord) -> None:
        self._store = store
        self._record = record

    @property
    def record(self) -> RunRecord:
        """What is known by now."""
        return self._record

    def note(self, **fields: Any) -> None:
        """Set fields of the record; they are published with the next event."""
        self._record = replace(self._record, **fields)

    def publish(self) -> None:
        """Let others see what is known by now."""
        _write(self._store, self._record)

    @contextlib.contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Record how long a block takes, by the name of a phase."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.note(phases={**self._record.phases, phase: time.perf_counter() - began})
            self.publish()

    @contextlib.contextmanager
    def attempt(self, ranks: int) -> Iterator[None]:
        """Record that so many ranks are launched in the block, and what becomes of them."""
        self.note(attempts=(*self._record.attempts, Attempt(time.time(), ranks=ranks)))
        self.publish()
        cause = noticed = None
        try:
            yield
        except BaseException as exc:
            cause = first_line(exc)
            noticed = exc.noticed if isinstance(exc, WorkerFailedError) else None
            raise
        finally:
            self._record = closed(self._record, time.time(), cause, noticed)
            with contextlib.suppress(StoreError):
                self._record = with_traces(self._store, replace(self._record, hosts=(), network=""))
            self.publish()

    def end(self, state: State, cause: BaseException | None = None) -> None:
        """Record what has become of the run."""
        now = time.time()
        text = None if cause is None else first_line(cause)
        self._record = replace(closed(self._record, now, text), state=state, ended=now, cause=text)
        self.publish()


@contextlib.contextmanager
def recorded(store: Store, run_id: str, *, goes_on: bool = False, **known: Any) -> Iterator[Recording]:
    """Keep a record of what becomes of a run in the block; errors of the block go through.

    Parameters
    ----------
    store, run_id
        Which one; the block must hold it, see :func:`in_progress`.
    goes_on
        Whether the block does what an earlier driver has left to do: then all that is in the record stays. Otherwise
        it keeps the attempts alone, and where else the run is logged.
    known
        What is known of it already.
    """
    earlier = _earlier(store, run_id, with_facts=goes_on)
    recording = Recording(store, RunRecord(run_id, "running", time.time(), **{**earlier, **known}))
    recording.publish()
    # A Store that goes meanwhile is not made anew for a note.
    recording._store = store.within(run_folder(run_id))
    try:
        yield recording
    except BaseException as exc:
        recording.end("interrupted" if _is_interruption(exc) else "failed", exc)
        raise
    recording.end("finished")


def record_stillborn(store: Store, run_id: str, state: State, started: float, cause: str | None, kind: str) -> None:
    """Record a run that ended before it began; there must be no record of it.

    Parameters
    ----------
    store, run_id
        Which one.
    state
        ``"failed"`` or ``"interrupted"``.
    started
        When its driver was, in seconds since the epoch.
    cause, kind
        As in the record.
    """
    _write(store, RunRecord(run_id, state, started, time.time(), cause, kind))


def publish_launch(
    store: Store, folder: str, ranks: Sequence[RankContext], rows: Mapping[str, int], network: str
) -> None:
    """Leave beside the logs what only the tasks of the stage know, once they have met.

    Parameters
    ----------
    store, folder
        Where the logs are.
    ranks
        The places of all ranks.
    rows
        ``rows`` and ``val_rows``, where the tasks have counted them.
    network
        As of :class:`~hvdspark.runs.RunRecord`.

    Raises
    ------
    StoreError
        When it cannot be written.
    """
    places = sorted(ranks, key=lambda context: context.rank)
    hosts = [asdict(RankPlace(context.rank, context.host, context.local_rank)) for context in places]
    store.publish_bytes(json.dumps({"hosts": hosts, "network": network, **rows}).encode(), folder, LAUNCH)


def first_line(exc: BaseException) -> str:
    """Return the first line of an error, with its class where it is not one of this library's; of Java's what tells."""
    if hasattr(exc, "java_exception"):
        return telling_line(exc)
    text = text_of(exc).strip().partition("\n")[0]
    return text if isinstance(exc, HvdSparkError) else f"{type(exc).__name__}: {text}".rstrip(": ")


def _is_interruption(exc: BaseException) -> bool:
    # Spark's own way of Ctrl-C is to cancel all jobs.
    is_cancelled = isinstance(exc, StageLostError) and exc.is_cancelled
    return is_cancelled or not isinstance(exc, Exception)


def _earlier(store: Store, run_id: str, *, with_facts: bool) -> dict[str, Any]:
    """Return what a run that goes on keeps of its record."""
    try:
        record = stored_record(store, run_id)
    except StoreError:
        return {}  # that the Store cannot be read shows where it matters
    if record is None or record.state == "damaged":
        return {}
    attempts = closed(record, record.ended).attempts
    if not attempts:  # it had not come to that
        attempts = (Attempt(record.started, record.ended, record.cause or GONE),)
    kept = {field.name: getattr(record, field.name) for field in fields(record)} if with_facts else {}
    of_the_driver = ("run_id", "state", "started", "ended", "cause")
    facts = {name: value for name, value in kept.items() if name not in of_the_driver}
    return {**facts, "attempts": attempts, "mlflow_run_id": record.mlflow_run_id}


def _write(store: Store, record: RunRecord) -> None:
    try:
        store.publish_bytes(to_json(record.to_json()).encode(), record_place(record.run_id))
    except (OSError, StoreError) as exc:
        # What is trained is worth more than the note of it.
        logger.warning("cannot record that %s is %s: %s", record.run_id, record.state, exc)
