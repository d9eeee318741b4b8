"""The Gloo control plane: the rendezvous through which ranks find each other, and Horovod's settings for it.

Horovod brings a rendezvous server of its own, but that one listens on all interfaces, takes writes from anybody,
and importing it imports TensorFlow. This one speaks the same few HTTP requests (``PUT``, ``GET`` and ``DELETE`` of
``/scope/key``; source: horovod/common/gloo/http_store.cc), answers only who knows the job's token, and holds only what
a rendezvous needs.

Horovod sends no token, but it makes the address of its requests of what it is given as ``address`` and ``port``:
``http://address:port/scope/key``. An address of ``10.0.0.1:4711/token`` makes that
``http://10.0.0.1:4711/token:4711/scope/key``.
"""

from __future__ import annotations

import contextlib
import hmac
import os
import re
import socket
from collections.abc import Iterable, Mapping
from http import HTTPStatus

from hvdspark.launch.door import Door, Guest

MAX_KEYS = 65536
_SCOPES = ("global", "local_", "cross_")
_HEAD_BYTES = 4096
_END_OF_HEAD = b"\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length:[ \t]*(\d{1,9})[ \t]*(?:\r\n|$)", re.IGNORECASE)
_CLOSE_TIMEOUT_S = 10.0

_ADDRESS, _PORT = "HOROVOD_GLOO_RENDEZVOUS_ADDR", "HOROVOD_GLOO_RENDEZVOUS_PORT"


class RendezvousServer(Door):
    """A key-value store for the addresses of the ranks, alive while the job runs.

    Horovod may be started again at any time, for which ranks must meet again; between their meetings there is nothing
    in it. Once a rank says that this will not be (:func:`close_rendezvous`), it listens no more.

    Parameters
    ----------
    address, members
        Where to listen, and the IP addresses that may connect; see :class:`~hvdspark.launch.door.Door`.
    ranks
        How many ranks there are. A rank writes one address per peer, which bounds the size of a value.
    token
        What one must know to be answered.
    """

    def __init__(self, address: str, members: Iterable[str], ranks: int, token: str) -> None:
        super().__init__(address, members, ranks)
        self._token = token.encode()
        self._max_value_bytes = 4096 + 512 * ranks
        self._scopes: dict[str, dict[str, bytes]] = {}
        self._finished: dict[str, set[str]] = {}

    def heard(self, guest: Guest) -> bool:
        """Answer a request, once all of it is there."""
        head, end, body = guest.rest.partition(_END_OF_HEAD)
        if not end:
            return len(head) <= _HEAD_BYTES
        method, parts = self._parse(head)
        if parts is None:
            return False
        found = _LENGTH.search(head)
        length = int(found[1]) if found else 0
        if length > self._max_value_bytes:
            guest.answer = _response(HTTPStatus.BAD_REQUEST)
        elif len(body) < length:
            return True
        else:
            guest.answer = self._respond(method, parts, body[:length])
        return False

    def _parse(self, head: bytes) -> tuple[str, list[str] | None]:
        """Return a request's method, and its path after the token; ``None`` for one of a stranger."""
        words = head.partition(b"\r\n")[0].split(b" ")
        if len(words) != 3 or not words[1].startswith(b"/"):
            return "", None
        token, *parts = words[1][1:].split(b"/")
        if not hmac.compare_digest(token.partition(b":")[0], self._token):
            return "", None
        return words[0].decode("ascii", "replace"), [part.decode("ascii", "replace") for part in parts]

    def _respond(self, method: str, parts: list[str], body: bytes) -> bytes:
        if method == "DELETE" and not parts:
            self._shut()
            return _response(HTTPStatus.OK)
        if len(parts) != 2 or not parts[0].startswith(_SCOPES) or method not in ("PUT", "GET", "DELETE"):
            return _response(HTTPStatus.NOT_FOUND if method == "GET" else HTTPStatus.BAD_REQUEST)
        scope, key = parts
        if method == "PUT":
            return _response(HTTPStatus.OK if self._put(scope, key, body) else HTTPStatus.CONFLICT)
        if method == "DELETE":
            self._finish(scope, key)
            return _response(HTTPStatus.OK)
        value = self._scopes.get(scope, {}).get(key)
        return _response(HTTPStatus.NOT_FOUND) if value is None else _response(HTTPStatus.OK, value)

    def _put(self, scope: str, key: str, value: bytes) -> bool:
        """Store a value; ``False`` when the key has one already or the store is full."""
        keys = self._scopes.setdefault(scope, {})
        if key in keys or sum(len(found) for found in self._scopes.values()) >= MAX_KEYS:
            return False
        keys[key] = value
        return True

    def _finish(self, scope: str, rank: str) -> None:
        """Note that a rank is through with a scope; once all are, forget it, so that it can be used again."""
        finished = self._finished.setdefault(scope, set())
        finished.add(rank)
        ranks = {key for key in self._scopes.get(scope, {}) if key.isdigit()}
        if ranks <= finished:
            self._scopes.pop(scope, None)
            self._finished.pop(scope, None)


def _response(status: HTTPStatus, body: bytes = b"") -> bytes:
    head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return head.encode() + body


def gloo_environment(address: tuple[str, int], token: str, interface: str) -> dict[str, str]:
    """Return the variables that make Horovod use Gloo, meet at an address and talk over one interface."""
    host, port = address
    return {
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        _ADDRESS: f"{host}:{port}/{token}",
        _PORT: str(port),
        "HOROVOD_GLOO_IFACE": interface,
    }


def close_rendezvous(environment: Mapping[str, str] = os.environ) -> None:
    """Have the rendezvous listen no more: all ranks have met, and Horovod will not be started again.

    Parameters
    ----------
    environment
        The variables of a rank; does nothing where they are not those of :func:`gloo_environment`.
    """
    place, _, token = environment.get(_ADDRESS, "").partition("/")
    if not token:
        return
    host, _, port = place.rpartition(":")
    # A server that does not answer is no reason to stop a training: it only stays open.
    with (
        contextlib.suppress(OSError),
        socket.create_connection((host, int(port)), timeout=_CLOSE_TIMEOUT_S) as connection,
    ):
        connection.sendall(f"DELETE /{token} HTTP/1.1\r\n\r\n".encode())
        connection.recv(_HEAD_BYTES)
