"""Which runs stay in a Store, and how the others go.

A run that is removed goes at once for all who look for it: its record is replaced by a mark first. Only then its files
go, and the mark after them; whoever removes has the run's lease meanwhile, as a fit has.
"""

from __future__ import annotations

import logging
import posixpath
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from hvdspark.aliases import list_aliases, path_in_store
from hvdspark.errors import ParamError, RunInProgressError
from hvdspark.lease import FOLDER as LEASES
from hvdspark.lease import is_held, remove_dead
from hvdspark.registry import list_runs
from hvdspark.runs import (
    PIPELINE,
    PREPARATION,
    RECORD,
    REMOVED,
    RUNS,
    RunRecord,
    in_progress,
    is_removed,
    record_place,
    run_folder,
    run_names,
    stored_record,
)
from hvdspark.store import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunFate:
    """What becomes of a run.

    Parameters
    ----------
    run_id
        Which.
    removed
        Whether it was removed, or would be.
    reason
        Why it goes or stays.
    size_bytes
        How much it held, where it goes.
    """

    run_id: str
    removed: bool
    reason: str
    size_bytes: int = 0


def gc_runs(
    store: Store, keep_last: int | None = None, older_than_s: float | None = None, *, dry_run: bool = False
) -> list[RunFate]:
    """Remove runs that are too many and too old; with both rules, those that both of them give up.

    Whatever the rules say, these stay: a run that a driver is at, one that an alias refers to or can be rolled back
    to, one in whose folder a Spark ML model was saved, and one whose record is damaged. A model that was saved
    elsewhere with ``write().save(path)`` is whole by itself, and needs no run. Datasets are :meth:`Store.gc`'s.

    Parameters
    ----------
    store
        Where the runs are.
    keep_last
        How many of the newest runs that finished stay, and as many of the newest of the others: a week of failures
        does not cost the last good model.
    older_than_s
        Seconds since a run ended after which it goes.
    dry_run
        Only say what would go.

    Returns
    -------
    list of RunFate
        What becomes of each run, the newest first.

    Raises
    ------
    ParamError
        When no rule is given, or one that cannot be, or when there is no such Store.
    AliasError
        When an alias is damaged: nobody knows then what it refers to, and nothing is removed.
    StoreError
        When the Store cannot be read or written; what was removed until then is gone.
    """
    _check_rules(keep_last, older_than_s)
    wanted = _wanted(store)
    records = {record.run_id: record for record in list_runs(store)}
    doomed = doomed_runs(records.values(), keep_last, older_than_s, time.time())
    fates = []
    for name in [*records, *(name for name in run_names(store) if name not in records)]:
        record = records.get(name)
        fate = _judged(store, name, record, wanted.get(name, ""), doomed.get(name, ""))
        if fate is not None and fate.removed and not dry_run:
            fate = _removed(store, fate, record)
        if fate is not None:
            fates.append(fate)
    return fates


def doomed_runs(
    records: Iterable[RunRecord], keep_last: int | None, older_than_s: float | None, now: float
) -> dict[str, str]:
    """Return the runs that the rules give up, with the reason; what protects a run is not looked at here.

    Parameters
    ----------
    records
        All runs. Damaged ones have no age, and stay.
    keep_last, older_than_s
        As for :func:`gc_runs`.
    now
        Seconds since the epoch.
    """
    whole = sorted((r for r in records if r.state != "damaged"), key=_age_key, reverse=True)
    finished = [record.run_id for record in whole if record.state == "finished"]
    others = [record.run_id for record in whole if record.state != "finished"]
    kept = set() if keep_last is None else {*finished[:keep_last], *others[:keep_last]}
    doomed = {}
    for record in whole:
        age_s = now - _last_sign(record)
        if record.run_id in kept or (older_than_s is not None and age_s <= older_than_s):
            continue
        doomed[record.run_id] = f"{age_s / 86400:.1f} days old" if older_than_s is not None else "there are newer ones"
    return doomed


def _check_rules(keep_last: int | None, older_than_s: float | None) -> None:
    if keep_last is None and older_than_s is None:
        raise ParamError("say which runs may go: give keep_last, older_than_s, or both", param="keep_last")
    if keep_last is not None and keep_last < 0:
        raise ParamError(f"keep_last={keep_last}: give 0 or more", param="keep_last")
    if older_than_s is not None and not older_than_s >= 0:
        raise ParamError(f"older_than_s={older_than_s}: give 0 or more seconds", param="older_than_s")


def _last_sign(record: RunRecord) -> float:
    """Return when a run was last known to be at work."""
    attempts = [time for attempt in record.attempts for time in (attempt.started, attempt.ended) if time is not None]
    return max([record.started, *attempts]) if record.ended is None else record.ended


def _age_key(record: RunRecord) -> tuple[float, str]:
    return _last_sign(record), record.run_id


def _wanted(store: Store) -> Mapping[str, str]:
    """Return the runs that aliases need, with the reason: by name, or because a model lies in their folders."""
    wanted: dict[str, str] = {}
    for name, entry in list_aliases(store).items():
        for kept in (entry, *entry.previous):
            reason = f"alias '{name}'" if kept is entry else f"alias '{name}' can be rolled back to it"
            place = path_in_store(store, kept.model) or ""
            inside = place.split("/")[1:2] if place.startswith(f"{RUNS}/") else []
            for run_id in (kept.run_id, *inside):
                wanted.setdefault(run_id, reason)
    return wanted


def _judged(store: Store, run_id: str, record: RunRecord | None, wanted: str, doomed: str) -> RunFate | None:
    """Say what is to become of a run; ``None`` where there is none of that name."""
    # Of a driver that trains, or of a job that is at what comes after it.
    held = is_held(store, run_folder(run_id))
    if record is None:
        leftover = _leftover(store, run_id)
        if held or leftover is None:
            return None
        doomed, protection = leftover
    else:
        protection = wanted or _saved_inside(store, record)
        if record.state == "damaged":
            protection = protection or str(record.cause)
    if held:
        protection = "in progress"
    if protection or not doomed:
        return RunFate(run_id, False, protection or "kept by the rules")
    return RunFate(run_id, True, doomed, int(store.filesystem.du(store.path(run_folder(run_id)))))


def _leftover(store: Store, run_id: str) -> tuple[str, str] | None:
    """Say of a folder without a record why it goes, or why it stays; ``None`` where it is gone."""
    if is_removed(store, run_id):
        return "its removal was cut off", ""
    names = _names(store, run_id)
    if names is None:
        return None
    if names - {LEASES}:
        return "", f"it has no {RECORD}; look at it, and delete it by hand"
    return "its driver died before it began", ""


def _saved_inside(store: Store, record: RunRecord) -> str:
    """Say that somebody saved a Spark ML model in the run's folder, beside what is the run's own."""
    folder = run_folder(record.run_id)
    own = {PREPARATION, PIPELINE, *(path.removeprefix(f"{folder}/") for path in record.artefacts.values())}
    for name in store.list(folder):
        if name not in own and any(part.startswith("part-") for part in _metadata(store, folder, name)):
            return f"a model was saved in it ({name})"
    return ""


def _metadata(store: Store, folder: str, name: str) -> Sequence[str]:
    place = (folder, name, "metadata")
    return store.list(*place) if store.filesystem.isdir(store.path(*place)) else ()


def _removed(store: Store, fate: RunFate, record: RunRecord | None) -> RunFate:
    """Remove a run, unless a fit or an alias wants it by now, or it is no longer the one that was looked at."""
    run_id, stays = fate.run_id, ""

    def is_wanted() -> bool:
        nonlocal stays
        stays = _wanted(store).get(run_id, "")
        return bool(stays)

    try:
        with in_progress(store, run_id) as own:
            # A job looks for any lease after it has taken its own: of the two at least one sees the other.
            if is_held(store, run_folder(run_id), but=own):
                return RunFate(run_id, False, "in progress")
            if not _is_as_it_was(store, run_id, record):
                return RunFate(run_id, False, "a fit has been at it meanwhile")
            if not discard(store, run_id, is_wanted):
                fate = RunFate(run_id, False, stays)
    except RunInProgressError:
        return RunFate(run_id, False, "in progress")
    if fate.removed:
        store.delete_if_empty(run_folder(run_id))
        logger.info("removed the run %s: %s", run_id, fate.reason)
    return fate


def _is_as_it_was(store: Store, run_id: str, record: RunRecord | None) -> bool:
    """Whether no fit has begun or ended since a record was read."""
    now = stored_record(store, run_id)
    if record is None or now is None:
        return record is None and now is None and (_leftover(store, run_id) or ("", ""))[0] != ""
    return (now.started, now.ended) == (record.started, record.ended)


def discard(store: Store, run_id: str, is_wanted: Callable[[], bool] = lambda: False) -> bool:
    """Remove a run, or what is left of one; the caller must hold it, see :func:`~hvdspark.runs.in_progress`.

    From the first moment on it is no run any more, so that nobody takes one that is half gone for whole; should this
    process die, :func:`~hvdspark.runs.is_removed` tells the next one that comes by.

    Parameters
    ----------
    store, run_id
        Which one.
    is_wanted
        Asked when nobody can find the run any longer: whoever found it before has said so by then.

    Returns
    -------
    bool
        Whether it was removed; otherwise all is as it was.

    Raises
    ------
    StoreError
        When it cannot be removed, or not wholly.
    """
    folder, place = run_folder(run_id), record_place(run_id)
    before = store.find_bytes(place)
    store.publish_bytes(REMOVED, place)
    wanted = True
    try:
        wanted = is_wanted()
    finally:
        if wanted and before is not None:
            store.publish_bytes(before, place)
        elif wanted:
            store.delete(place)
    if wanted:
        return False
    for name in sorted((_names(store, run_id) or set()) - {RECORD, LEASES}):
        store.delete(folder, name)
    remove_dead(store, folder)
    store.delete(place)
    return True


def _names(store: Store, run_id: str) -> set[str] | None:
    """Return all names in a run's folder, also those that Store.list() leaves out: files whose writers died."""
    try:
        found = store.filesystem.ls(store.path(run_folder(run_id)), detail=False)
    except FileNotFoundError:
        return None
    return {posixpath.basename(path.rstrip("/")) for path in found}
