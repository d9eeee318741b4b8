"""Leases in a Store: a process says that it uses a folder, for as long as it does and not longer.

A lease is a small file that its holder writes again and again. Who dies no longer does, and after a while, or at once
where the looker sees the processes of the holder's host, the lease counts for nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvdspark.errors import StoreError

if TYPE_CHECKING:
    from hvdspark.store import Store

logger = logging.getLogger(__name__)

FOLDER = "leases"

# A lease that was not renewed for so long is that of a process which died. Hosts' clocks may differ by less.
RENEWAL_S = 20.0
STALE_S = 180.0

# The longest pause between two looks at a folder that another process holds alone.
_LONGEST_PAUSE_S = 1.0

# Who ends removes the folder of leases, perhaps just before another writes into it.
_TRIES = 10

_FIELDS = {"time": float, "host": str, "space": str | None, "pid": int, "started": int | None}

# What this process holds now: of its own it need not guess, also where the file of one that ended could not be removed.
_own: set[tuple[str, str]] = set()


@contextlib.contextmanager
def held(store: Store, folder: str, kind: str) -> Iterator[str]:
    """Hold a lease on a folder for the time of a block.

    Parameters
    ----------
    store
        Where the folder is.
    folder
        Relative to the Store; it need not exist.
    kind
        What for, such as ``"reader"``. Any number of processes may hold leases of one kind.

    Yields
    ------
    str
        The lease's name in the Store.

    Raises
    ------
    StoreError
        When the lease cannot be written at first; later failures are only logged.
    """
    name = f"{folder}/{FOLDER}/{kind}-{uuid.uuid4().hex[:12]}.json"
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEWAL_S):
            try:
                # Never into the empty place of a Store that has gone for a while.
                store.within(folder).publish_bytes(_holder(), name)
            except Exception as exc:  # noqa: BLE001 - the next time may go well, and the work must go on
                logger.warning("cannot renew the lease %s: %s", store.url_of(name), exc)

    _publish_first(store, name)
    _own.add((store.url, name))
    thread = threading.Thread(target=renew, name=f"hvdspark {kind} lease", daemon=True)
    thread.start()
    try:
        yield name
    finally:
        ended.set()
        thread.join()
        _own.discard((store.url, name))
        with contextlib.suppress(StoreError):
            store.delete(name)
        store.delete_if_empty(folder, FOLDER)


@contextlib.contextmanager
def held_alone(store: Store, folder: str, kind: str, timeout_s: float = STALE_S + 60) -> Iterator[str]:
    """Hold a lease that no other process or thread holds at the same time, for the time of a block.

    All announce themselves first and look for others then, so that of two at least one sees the other; who sees
    another withdraws and tries again after a while that chance decides.

    Parameters
    ----------
    store, folder, kind
        As for :func:`held`. All holders of this kind must take it by this function.
    timeout_s
        How long to wait for others; by default longer than a process that died on another host is in the way.

    Yields
    ------
    str
        The lease's name in the Store.

    Raises
    ------
    StoreError
        When others hold it all that time, or the lease cannot be written.
    """
    deadline = time.monotonic() + timeout_s
    pause_s = 0.05
    while True:
        # A look before the announcement spares those who are at it the sight of all who wait.
        if not is_held(store, folder, kind):
            with held(store, folder, kind) as name:
                if not is_held(store, folder, kind, but=name):
                    yield name
                    return
        if time.monotonic() > deadline:
            raise StoreError(
                f"other processes hold {store.url_of(folder)} ({kind}) for {timeout_s:.0f} s already; try again when"
                f" they have ended, and if none is running, remove {store.url_of(folder, FOLDER)}",
                url=store.url_of(folder),
            )
        time.sleep(random.uniform(pause_s / 5, pause_s))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)


def is_held(store: Store, folder: str, kind: str = "", *, but: str = "") -> bool:
    """Whether anybody holds a lease of a kind (by default of any) on a folder, as far as one can tell.

    Parameters
    ----------
    store, folder, kind
        Which leases.
    but
        The name of one that does not count, as :func:`held` gives it.

    Raises
    ------
    StoreError
        When a lease cannot be read: its holder may be at work.
    """
    names = [name for name in store.list(folder, FOLDER) if name.startswith(kind) and name.endswith(".json")]
    places = (f"{folder}/{FOLDER}/{name}" for name in names)
    return any(_is_alive(store, place) for place in places if place != but)


def remove_dead(store: Store, folder: str) -> None:
    """Remove the leases on a folder whose holders have died; raises :class:`StoreError` when that cannot be."""
    for name in store.list(folder, FOLDER):
        if not _is_alive(store, f"{folder}/{FOLDER}/{name}"):
            store.delete(folder, FOLDER, name)


def _publish_first(store: Store, name: str) -> None:
    for _ in range(_TRIES - 1):
        try:
            store.publish_bytes(_holder(), name)
        except StoreError as exc:
            if not isinstance(exc.__cause__, FileNotFoundError | NotADirectoryError):
                raise
        else:
            return
    store.publish_bytes(_holder(), name)


def _holder() -> bytes:
    pid = os.getpid()
    space = _space()
    started = None if space is None else _start_of(pid)
    holder = {"time": time.time(), "host": socket.gethostname(), "space": space, "pid": pid, "started": started}
    return json.dumps(holder).encode()


def _is_alive(store: Store, name: str) -> bool:
    lease: dict[str, Any] | None = store.read_json(name)
    # What makes no sense was not written by a holder.
    if lease is None or not all(isinstance(lease.get(name), kind) for name, kind in _FIELDS.items()):
        return False
    if time.time() - lease["time"] > STALE_S:
        return False
    if lease["space"] is None or lease["started"] is None or lease["space"] != _space():
        return True
    if lease["pid"] == os.getpid():
        return (store.url, name) in _own
    # Here nobody need wait for a process that is gone.
    return not _has_ended(lease["pid"], lease["started"])


def _space() -> str | None:
    """Name the space in which this process's number means it; ``None`` where nobody can tell.

    Hosts may have one name (``localhost``), and containers that of their host, with numbers of their own: only what the
    kernel says of itself, and of where it counts, tells them apart.
    """
    try:
        if Path("/proc/self").readlink().name != str(os.getpid()):
            return None  # it shows the processes of another space
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{socket.gethostname()} {boot} {Path('/proc/self/ns/pid').stat().st_ino}"
    except OSError:
        return None


def _has_ended(pid: int, started: int) -> bool:
    """Whether a process of this space is gone; another one may have its number by now."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass  # it is there, and another user's
    now = _start_of(pid)
    return now is not None and now != started


def _start_of(pid: int) -> int | None:
    """Return when a process began, in the kernel's ticks since it did itself; ``None`` where nobody can tell."""
    try:
        # The name in parentheses may hold anything, so the fields are counted from behind it.
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
