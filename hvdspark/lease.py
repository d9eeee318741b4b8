"""Leases in a Store: a process says that it uses a folder, for as long as it does and not longer.

A lease is a small file that its holder writes again and again. Who dies no longer does, and after a while, or at once
where the looker is on the same host, the lease counts for nothing.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import psutil

from hvdspark.errors import StoreError

if TYPE_CHECKING:
    from hvdspark.store import Store

logger = logging.getLogger(__name__)

_FOLDER = "leases"

# A lease that was not renewed for so long is that of a process which died. Hosts' clocks may differ by less.
RENEWAL_S = 20.0
STALE_S = 180.0

_FIELDS = {"time": float, "host": str, "pid": int, "started": float}

# What this process holds now: of its own it need not guess, also where the file of one that ended could not be removed.
_own: set[tuple[str, str]] = set()

# What two looks at the start of one process may differ by.
_SAME_START_S = 2.0


@contextlib.contextmanager
def held(store: Store, folder: str, kind: str) -> Iterator[None]:
    """Hold a lease on a folder for the time of a block.

    Parameters
    ----------
    store
        Where the folder is.
    folder
        Relative to the Store; it need not exist.
    kind
        What for, such as ``"reader"``. Any number of processes may hold leases of one kind.

    Raises
    ------
    StoreError
        When the lease cannot be written at first; later failures are only logged.
    """
    name = f"{folder}/{_FOLDER}/{kind}-{uuid.uuid4().hex[:12]}.json"
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEWAL_S):
            try:
                # Never into the empty place of a Store that has gone for a while.
                store.within(folder).publish_bytes(_holder(), name)
            except Exception as exc:  # noqa: BLE001 - the next time may go well, and the work must go on
                logger.warning("cannot renew the lease %s: %s", store.url_of(name), exc)

    store.publish_bytes(_holder(), name)
    _own.add((store.url, name))
    thread = threading.Thread(target=renew, name=f"hvdspark {kind} lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        _own.discard((store.url, name))
        with contextlib.suppress(StoreError):
            store.delete(name)
        store.delete_if_empty(folder, _FOLDER)


def is_held(store: Store, folder: str, kind: str = "") -> bool:
    """Whether anybody holds a lease of a kind (by default of any) on a folder, as far as one can tell."""
    names = [name for name in store.list(folder, _FOLDER) if name.startswith(kind) and name.endswith(".json")]
    return any(_is_alive(store, f"{folder}/{_FOLDER}/{name}") for name in names)


def _holder() -> bytes:
    own = psutil.Process()
    holder = {"time": time.time(), "host": socket.gethostname(), "pid": own.pid, "started": own.create_time()}
    return json.dumps(holder).encode()


def _is_alive(store: Store, name: str) -> bool:
    lease: dict[str, Any] | None = store.read_json(name)
    # What makes no sense was not written by a holder.
    if lease is None or not all(isinstance(lease.get(name), kind) for name, kind in _FIELDS.items()):
        return False
    if time.time() - lease["time"] > STALE_S:
        return False
    if lease["host"] != socket.gethostname():
        return True
    if lease["pid"] == os.getpid():
        return (store.url, name) in _own
    # On this host nobody need wait for a process that is gone.
    try:
        return bool(abs(psutil.Process(lease["pid"]).create_time() - lease["started"]) < _SAME_START_S)
    except psutil.NoSuchProcess:
        return False
