"""Datasets in a Store under a key of what is in them, so that a fit finds what an earlier one wrote.

::

    datasets/<key>/<attempt>/      the files of one writing
    datasets/<key>/entry.json      names the attempt that is whole; published last
    datasets/<key>/used.json       when a fit last began to use it
    datasets/<key>/leases/         who writes or reads it now, see hvdspark.lease

A writer that dies leaves an attempt that no entry names, and a lease that nobody renews: it is never taken for whole,
and goes when the next writer is through, or by :func:`collect`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from hvdspark import lease
from hvdspark.errors import StoreError

if TYPE_CHECKING:
    from hvdspark.store import Store

logger = logging.getLogger(__name__)

DATASETS = "datasets"

_ENTRY, _USED = "entry.json", "used.json"
_ATTEMPT = re.compile(r"[0-9a-f]{12}")

# One writer at a time among the threads of this process, as a CrossValidator with parallelism has them.
_locks: dict[tuple[str, str], threading.Lock] = {}
_locks_guard = threading.Lock()


@contextlib.contextmanager
def dataset_of(store: Store, key: str, write: Callable[[str], None], *, keep: bool = True) -> Iterator[str]:
    """Find or write a dataset, and keep it from being removed for the time of a block.

    Parameters
    ----------
    store
        Where it is.
    key
        Digest of everything that its content depends on.
    write
        Writes the dataset into the folder that it is given (relative to the Store), and cleans up after itself when
        that fails; called only where there is none.
        Of several processes that want the same dataset at once one writes it, and the others wait.
    keep
        Whether it stays for later fits; otherwise it is removed after the block.

    Yields
    ------
    str
        The dataset's folder, relative to the Store.
    """
    folder = f"{DATASETS}/{key}"
    try:
        # The lease comes before the look at the entry: collect() looks at leases after it took the entry away.
        with lease.held(store, folder, "reader") as own:
            dataset = _find(store, folder) or _write_once(store, folder, own, write)
            store.publish_bytes(json.dumps({"time": time.time()}).encode(), folder, _USED)
            try:
                yield dataset
            finally:
                if not keep:
                    _discard(store, folder)
    finally:
        # Nothing is left of a writing that failed.
        store.delete_if_empty(folder)


def _find(store: Store, folder: str) -> str | None:
    """Return the whole dataset of a key, where there is one."""
    entry = _entry(store, folder)
    if entry is None or not store.exists(folder, entry["attempt"]):
        return None
    dataset = f"{folder}/{entry['attempt']}"
    size_bytes = _size_bytes(store, dataset)
    if size_bytes != entry["size_bytes"]:
        logger.warning(
            "%s is not as it was written: it holds %d bytes instead of %d, and is written anew",
            store.url_of(dataset),
            size_bytes,
            entry["size_bytes"],
        )
        return None
    return dataset


def _entry(store: Store, folder: str) -> dict[str, Any] | None:
    """Return what is noted of a whole dataset; ``None`` where nothing is, or nothing that makes sense."""
    entry = store.read_json(folder, _ENTRY)
    if entry is None or not isinstance(entry.get("attempt"), str) or not _ATTEMPT.fullmatch(entry["attempt"]):
        return None
    return entry if all(isinstance(entry.get(name), int | float) for name in ("size_bytes", "written")) else None


def _size_bytes(store: Store, dataset: str) -> int:
    return int(store.filesystem.du(store.path(dataset)))


def _write_once(store: Store, folder: str, own: str, write: Callable[[str], None]) -> str:
    """Write a dataset, unless another does it meanwhile; ``own`` is the lease by which this one reads."""
    with _locks_guard:
        lock = _locks.setdefault((store.url, folder), threading.Lock())
    # Writing takes as long as it takes; should its process die, the lease ends.
    with lock, lease.held_alone(store, folder, "writer", math.inf):
        return _find(store, folder) or _write(store, folder, own, write)


def _write(store: Store, folder: str, own: str, write: Callable[[str], None]) -> str:
    attempt = uuid.uuid4().hex[:12]
    dataset = f"{folder}/{attempt}"
    before = _entry(store, folder)
    write(dataset)
    entry = {"attempt": attempt, "size_bytes": _size_bytes(store, dataset), "written": time.time()}
    store.publish_bytes(json.dumps(entry).encode(), folder, _ENTRY)
    for other in _attempts(store, folder) - {attempt}:
        # One that the entry named until now may still be read by whoever found it.
        if before is None or other != before["attempt"] or not lease.is_held(store, folder, "reader", but=own):
            _discard(store, f"{folder}/{other}")
    return dataset


def _attempts(store: Store, folder: str) -> set[str]:
    return {name for name in store.list(folder) if _ATTEMPT.fullmatch(name)}


@dataclass(frozen=True)
class Removed:
    """A dataset that was removed, or would be.

    Parameters
    ----------
    folder
        Relative to the Store.
    size_bytes
        How much it held; zero for one that was never whole.
    reason
        ``"age"``: not used for too long; ``"size"``: the least recently used, while all together held too much;
        ``"unfinished"``: its writer died, or it was damaged and written anew.
    """

    folder: str
    size_bytes: int
    reason: Literal["age", "size", "unfinished"]


def collect(store: Store, max_bytes: float, max_age_s: float, *, dry_run: bool = False) -> list[Removed]:
    """Remove datasets that are unfinished, unused for too long, or too many; never one that somebody uses.

    Parameters
    ----------
    store
        Where they are.
    max_bytes
        How much those that stay may hold together.
    max_age_s
        Seconds without use after which one goes.
    dry_run
        Only say what would go.

    Returns
    -------
    list of Removed
        What went, or would go.
    """
    doomed = list(_doomed(store, max_bytes, max_age_s))
    return doomed if dry_run else [item for item in doomed if _remove_unused(store, item.folder)]


def _doomed(store: Store, max_bytes: float, max_age_s: float) -> Iterator[Removed]:
    whole = []
    for name in store.list(DATASETS):
        folder = f"{DATASETS}/{name}"
        others, is_used, entry = _look(store, folder)
        if entry is not None:
            used_at = (store.read_json(folder, _USED) or {}).get("time")
            size_bytes = entry["size_bytes"]
            if is_used:
                size_bytes += sum(_size_bytes(store, f"{folder}/{attempt}") for attempt in others)
            else:
                yield from (Removed(f"{folder}/{attempt}", 0, "unfinished") for attempt in sorted(others))
            whole.append((used_at if isinstance(used_at, float) else entry["written"], folder, size_bytes))
        elif not is_used:
            yield Removed(folder, 0, "unfinished")
    total, now = 0, time.time()
    for used_at, folder, size_bytes in sorted(whole, reverse=True):
        total += size_bytes
        too_old = now - used_at > max_age_s
        if (too_old or total > max_bytes) and not lease.is_held(store, folder):
            total -= size_bytes
            yield Removed(folder, size_bytes, "age" if too_old else "size")


def _look(store: Store, folder: str) -> tuple[set[str], bool, dict[str, Any] | None]:
    """Return the attempts that are not the whole one, whether somebody reads or writes now, and the entry."""
    # In this order: who has ended writing one of these publishes its entry before giving up the lease.
    attempts = _attempts(store, folder)
    is_used = lease.is_held(store, folder)
    entry = _entry(store, folder)
    return attempts - {"" if entry is None else entry["attempt"]}, is_used, entry


def _remove_unused(store: Store, folder: str) -> bool:
    """Remove a dataset, or an attempt at one, unless somebody begins to use it at this moment."""
    key, _, attempt = folder.removeprefix(f"{DATASETS}/").partition("/")
    if attempt:
        others, is_used, _ = _look(store, f"{DATASETS}/{key}")
        if is_used or attempt not in others:
            return False
        _discard(store, folder)
        return True
    entry = store.find_bytes(folder, _ENTRY)
    if entry is not None:
        # From here on nobody finds it; whoever found it before has a lease already.
        store.delete(folder, _ENTRY)
    if lease.is_held(store, folder):
        if entry is not None:
            store.publish_bytes(entry, folder, _ENTRY)
        return False
    _discard(store, folder)
    return True


def _discard(store: Store, folder: str) -> None:
    """Delete a folder; that a Store refuses it must not lose a model that was trained on what is in it."""
    try:
        store.delete(folder)
    except StoreError as exc:
        logger.warning("%s", exc)
