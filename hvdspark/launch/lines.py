"""A small server for the processes of one job, to which they say lines of text.

It listens on one address, takes connections of the job's hosts only, and from those only who knows the job's token and
a number that nobody has yet. All is done by one thread that never waits for anybody.
"""

from __future__ import annotations

import contextlib
import hmac
import selectors
import socket
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Self

_LINE_BYTES = 4096
_BACKLOG = 512

# A host that is cut off sends no end of a connection: after this it is taken for gone.
_IDLE_S, _PROBE_S, _PROBES = 5, 2, 3


@dataclass(eq=False)
class Member:
    """Somebody at the other end of a connection; of the job once it has a number."""

    connection: socket.socket
    number: int | None = None
    rest: bytes = field(default=b"", repr=False)

    def say(self, text: str) -> bool:
        """Send a line; ``False`` when it does not go out at once, which a member that listens never causes."""
        try:
            self.connection.sendall(text.encode() + b"\n")
        except OSError:
            return False
        return True


class LineServer:
    """Answers the members of a job; alive while the job runs. Use as a context manager.

    Parameters
    ----------
    address
        IP address to listen on; the port is chosen by the system.
    hosts
        IP addresses that may connect. Without any, those who come wait until there are, see :meth:`admit`.
    size
        How many members there are.
    token
        What one must know to be a member.
    """

    def __init__(self, address: str, hosts: Iterable[str], size: int, token: str) -> None:
        self.size = size
        self.members: dict[int, Member] = {}
        self._hosts = frozenset(hosts)
        self._knows_hosts = threading.Event()
        self._token = token.encode()
        self._listener = socket.create_server((address, 0), backlog=_BACKLOG)
        self._listener.setblocking(False)
        self._stopped, self._stop = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._stopped, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name=type(self).__name__, daemon=True)

    @property
    def address(self) -> tuple[str, int]:
        """IP address and port."""
        host, port = self._listener.getsockname()[:2]
        return str(host), int(port)

    def admit(self, hosts: Iterable[str]) -> None:
        """Let these IP addresses connect."""
        self._hosts = frozenset(hosts)
        self._knows_hosts.set()

    def obey(self, member: Member, line: str) -> bool:
        """Do as a member says; ``False`` ends its connection."""
        raise NotImplementedError

    def joined(self, member: Member) -> None:
        """Note that a member has come."""

    def lost(self, member: Member) -> None:
        """Note that a member's connection has ended."""

    def __enter__(self) -> Self:
        if self._hosts:
            self._knows_hosts.set()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.close()
        self._knows_hosts.set()
        self._thread.join()

    def _serve(self) -> None:
        self._knows_hosts.wait()
        try:
            while True:
                for key, _ in self._selector.select():
                    if key.fileobj is self._stopped:
                        return
                    if key.fileobj is self._listener:
                        self._accept()
                    else:
                        self._receive(key.data)
        finally:
            for key in list(self._selector.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]  # all of them are sockets
            self._selector.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, (host, *_) = self._listener.accept()
            if host not in self._hosts:
                connection.close()
                return
            # Nobody's turn may depend on one who reads nothing; what members are told fits into a socket's buffer.
            connection.setblocking(False)
            keep_alive(connection)
            self._selector.register(connection, selectors.EVENT_READ, Member(connection))

    def _receive(self, member: Member) -> None:
        try:
            data = member.connection.recv(_LINE_BYTES)
        except OSError:
            data = b""
        *lines, member.rest = (member.rest + data).split(b"\n")
        if data and len(member.rest) <= _LINE_BYTES and all(self._take(member, line) for line in lines):
            return
        self._selector.unregister(member.connection)
        member.connection.close()
        if member.number is not None:
            self.lost(member)

    def _take(self, member: Member, line: bytes) -> bool:
        if member.number is not None:
            return self.obey(member, line.decode("ascii", "replace"))
        token, _, number = line.partition(b" ")
        if not hmac.compare_digest(token, self._token) or not number.isdigit():
            return False
        # One that was here may not come again either: there is only one of each.
        if int(number) >= self.size or int(number) in self.members:
            return False
        member.number = int(number)
        self.members[member.number] = member
        self.joined(member)
        return True


def connect(address: tuple[str, int], token: str, number: int, timeout_s: float) -> socket.socket:
    """Connect to a job's server as one of its members.

    Parameters
    ----------
    address, token
        Where the server is, and its token.
    number
        Who this is.
    timeout_s
        Seconds to wait.

    Raises
    ------
    OSError
        When nobody answers there.
    """
    connection = socket.create_connection(address, timeout=timeout_s)
    connection.settimeout(None)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    keep_alive(connection)
    connection.sendall(f"{token} {number}\n".encode())
    return connection


def keep_alive(connection: socket.socket) -> None:
    """Have the system end a connection whose other end is cut off."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", _IDLE_S), ("TCP_KEEPINTVL", _PROBE_S), ("TCP_KEEPCNT", _PROBES)):
        if hasattr(socket, option):  # not all systems have them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
