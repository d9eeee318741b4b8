"""Whether executors share a Store with the driver: each reads what the driver left, and leaves something itself."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Self

from hvdspark.errors import StoreError
from hvdspark.store import Store


class StoreTrial:
    """A folder of its own in a Store, removed in the end. A context manager.

    Parameters
    ----------
    store
        The Store.

    Raises
    ------
    StoreError
        On entering, when the driver cannot write to it.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._folder = f"doctor-{secrets.token_hex(8)}"
        self._token = secrets.token_hex(16)

    def __enter__(self) -> Self:
        self._store.check_writable()
        self._store.publish_bytes(self._token.encode(), self._folder, "driver")
        return self

    def __exit__(self, *_: object) -> None:
        self._store.delete(self._folder)

    @property
    def settings(self) -> Mapping[str, Any]:
        """What a probe needs."""
        if self._store.is_local:
            # A folder needs nothing but Python itself.
            return {"folder": self._store.path(self._folder), "ref": None, "token": self._token}
        return {"folder": self._folder, "ref": asdict(self._store.ref()), "token": self._token}

    def came_back(self, executors: Sequence[str]) -> dict[str, str | None]:
        """Say what is wrong with what executors left, by their names; ``None`` where it is as it should be."""
        found: dict[str, str | None] = {}
        for executor in executors:
            try:
                data = self._store.read_bytes(self._folder, f"executor-{executor}")
                found[executor] = None if data.decode(errors="replace") == self._token else "it holds something else"
            except StoreError as exc:
                found[executor] = str(exc)
        return found
