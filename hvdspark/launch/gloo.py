"""The Gloo control plane: the rendezvous through which ranks find each other, and Horovod's settings for it.

Horovod brings a rendezvous server of its own, but that one listens on all interfaces, takes writes from anybody,
and importing it imports TensorFlow. This one speaks the same few HTTP requests (``PUT``, ``GET`` and ``DELETE`` of
``/scope/key``; source: horovod/common/gloo/http_store.cc), listens on one address, answers members only, and holds
only what a rendezvous needs.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MAX_KEYS = 65536
_SCOPES = ("global", "local_", "cross_")


class RendezvousServer:
    """A key-value store for the addresses of the ranks, alive while the job runs.

    Use as a context manager.

    Parameters
    ----------
    address
        IP address to listen on; the port is chosen by the system.
    members
        IP addresses that may connect.
    ranks
        How many ranks there are. A rank writes one address per peer, which bounds the size of a value.
    """

    def __init__(self, address: str, members: Iterable[str], ranks: int) -> None:
        self._server = _Server((address, 0), frozenset(members), max_value_bytes=4096 + 512 * ranks)
        self._thread = threading.Thread(target=self._server.serve_forever, name="rendezvous", daemon=True)

    @property
    def address(self) -> tuple[str, int]:
        """IP address and port."""
        host, port = self._server.server_address[:2]
        return str(host), int(port)

    def admit(self, members: Iterable[str]) -> None:
        """Let these IP addresses connect, instead of those given first."""
        self._server.members = frozenset(members)

    def __enter__(self) -> RendezvousServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def gloo_environment(address: tuple[str, int], interface: str) -> dict[str, str]:
    """Return the variables that make Horovod use Gloo, meet at an address and talk over one interface."""
    return {
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": address[0],
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(address[1]),
        "HOROVOD_GLOO_IFACE": interface,
    }


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    # A job of many ranks connects all at once.
    request_queue_size = 512

    def __init__(self, address: tuple[str, int], members: frozenset[str], max_value_bytes: int) -> None:
        super().__init__(address, _Handler)
        self.members = members
        self.max_value_bytes = max_value_bytes
        self.scopes: dict[str, dict[str, bytes]] = {}
        self.finished: dict[str, set[str]] = {}
        self.lock = threading.Lock()

    def verify_request(self, _request: Any, client_address: Any) -> bool:
        return client_address[0] in self.members

    def put(self, scope: str, key: str, value: bytes) -> bool:
        """Store a value; ``False`` when the key has one already or the store is full."""
        with self.lock:
            keys = self.scopes.setdefault(scope, {})
            if key in keys or sum(len(found) for found in self.scopes.values()) >= MAX_KEYS:
                return False
            keys[key] = value
            return True

    def get(self, scope: str, key: str) -> bytes | None:
        with self.lock:
            return self.scopes.get(scope, {}).get(key)

    def finish(self, scope: str, rank: str) -> None:
        """Note that a rank is through with a scope; once all are, forget it, so that it can be used again."""
        with self.lock:
            finished = self.finished.setdefault(scope, set())
            finished.add(rank)
            ranks = {key for key in self.scopes.get(scope, {}) if key.isdigit()}
            if ranks <= finished:
                self.scopes.pop(scope, None)
                self.finished.pop(scope, None)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = 10

    def do_PUT(self) -> None:
        target = self._target()
        length = int(self.headers.get("Content-Length", "-1"))
        if target is None or not 0 <= length <= self.server.max_value_bytes:
            self._answer(HTTPStatus.BAD_REQUEST)
            return
        stored = self.server.put(*target, self.rfile.read(length))
        self._answer(HTTPStatus.OK if stored else HTTPStatus.CONFLICT)

    def do_GET(self) -> None:
        target = self._target()
        value = self.server.get(*target) if target is not None else None
        if value is None:
            self._answer(HTTPStatus.NOT_FOUND)
        else:
            self._answer(HTTPStatus.OK, value)

    def do_DELETE(self) -> None:
        target = self._target()
        if target is not None:
            self.server.finish(*target)
        self._answer(HTTPStatus.OK)

    def _target(self) -> tuple[str, str] | None:
        parts = self.path.split("/")
        if len(parts) != 3 or not parts[1].startswith(_SCOPES):
            return None
        return parts[1], parts[2]

    def _answer(self, status: HTTPStatus, body: bytes = b"") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Keep requests out of the task's log."""
