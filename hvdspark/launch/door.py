"""A door for the processes of one job: it listens on one address, and is opened to nobody else.

What comes from a host that is not the job's is turned away unheard. Whoever else comes has some seconds to prove that
it belongs to the job, and no more than so many wait for that at once: those who came first and said nothing go first.
All is done by one thread that never waits for anybody, so that neither a crowd nor a slow stranger keeps the members
out.
"""

from __future__ import annotations

import contextlib
import logging
import selectors
import socket
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar, Self

logger = logging.getLogger(__name__)

_BACKLOG = 512
_CHUNK_BYTES = 4096

# Seconds to prove oneself, and how many may be about it at once, besides the members, who all may come at once.
PATIENCE_S = 10.0
WAITING_ROOM = 128

# How many addresses that are turned away are told, of what may be many.
_NOTED = 8

# A host that is cut off sends no end of a connection: after this it is taken for gone.
_IDLE_S, _PROBE_S, _PROBES = 5, 2, 3


@dataclass(eq=False)
class Guest:
    """Somebody at the other end of a connection.

    Parameters
    ----------
    connection
        The connection, which never blocks.
    rest
        What it said that nobody has made use of yet.
    answer
        What it is still to be told.
    is_known
        Whether it has proved to belong to the job.
    """

    connection: socket.socket
    rest: bytes = field(default=b"", repr=False)
    answer: bytes = field(default=b"", repr=False)
    is_known: bool = False


class Door:
    """Listens for the members of a job; alive while the job runs. Use as a context manager.

    Parameters
    ----------
    address
        IP address to listen on; the port is chosen by the system.
    hosts
        IP addresses that may connect. Without any, those who come wait until there are, see :meth:`admit`.
    size
        How many members there are.

    Raises
    ------
    OSError
        When the address cannot be listened on.
    """

    _guest_type: ClassVar[type[Guest]] = Guest

    def __init__(self, address: str, hosts: Iterable[str], size: int) -> None:
        self.size = size
        self._hosts = frozenset(hosts)
        self._knows_hosts = threading.Event()
        try:
            self._listener = socket.create_server((address, 0), backlog=_BACKLOG)
        except OSError as exc:
            raise OSError(
                f"nothing can listen at {address}, where ranks are to meet: {exc}. Is that an address of this host?"
                " Name the interface to use with nics=[…]."
            ) from exc
        self._listener.setblocking(False)
        host, port = self._listener.getsockname()[:2]
        self._address = (str(host), int(port))
        # Until when each of those who are to prove themselves has time, in the order in which they came.
        self._unproven: dict[Guest, float] = {}
        self._turned_away: set[str] = set()
        self._stopped, self._stop = socket.socketpair()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._stopped, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name=type(self).__name__, daemon=True)

    @property
    def address(self) -> tuple[str, int]:
        """IP address and port."""
        return self._address

    def admit(self, hosts: Iterable[str]) -> None:
        """Let these IP addresses connect."""
        self._hosts = frozenset(hosts)
        self._knows_hosts.set()

    def heard(self, guest: Guest) -> bool:
        """Take what a guest has said, in ``rest``; ``False`` ends its connection, once its answer is out."""
        raise NotImplementedError

    def left(self, guest: Guest) -> None:
        """Note that a guest's connection has ended."""

    def __enter__(self) -> Self:
        if self._hosts:
            self._knows_hosts.set()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Listen no more and end all connections; does nothing the second time."""
        self._stop.close()
        self._knows_hosts.set()
        self._thread.join()

    def _shut(self) -> None:
        """Let nobody in any more; those who are in stay. For the server's own thread."""
        if self._listener.fileno() >= 0:
            self._selector.unregister(self._listener)
            self._listener.close()

    def _recognize(self, guest: Guest) -> None:
        """Note that a guest belongs to the job."""
        guest.is_known = True
        self._unproven.pop(guest, None)

    def _serve(self) -> None:
        self._knows_hosts.wait()
        try:
            while True:
                for key, events in self._selector.select(self._patience_s()):
                    if key.fileobj is self._stopped:
                        return
                    if key.fileobj is self._listener:
                        self._accept()
                    elif key.fileobj.fileno() >= 0:  # type: ignore[union-attr]  # not ended by what came before
                        self._attend(key.data, events)
                self._see_out()
        finally:
            for key in list(self._selector.get_map().values()):
                key.fileobj.close()  # type: ignore[union-attr]  # all of them are sockets
            self._listener.close()
            self._selector.close()

    def _patience_s(self) -> float | None:
        """Return the seconds until somebody has had time enough."""
        first = next(iter(self._unproven.values()), None)
        return None if first is None else max(0.0, first - time.monotonic())

    def _see_out(self) -> None:
        """End the connections of those who did not prove themselves in time, or are too many."""
        now = time.monotonic()
        surplus = len(self._unproven) - WAITING_ROOM - self.size
        for number, (guest, deadline) in enumerate(list(self._unproven.items())):
            if deadline > now and number >= surplus:
                return
            self._end(guest)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, (host, *_) = self._listener.accept()
            if host not in self._hosts:
                connection.close()
                self._note(host)
                return
            # Nobody's turn may depend on one who reads nothing.
            connection.setblocking(False)
            keep_alive(connection)
            guest = self._guest_type(connection)
            self._selector.register(connection, selectors.EVENT_READ, guest)
            self._unproven[guest] = time.monotonic() + PATIENCE_S

    def _note(self, host: str) -> None:
        """Log that an address was turned away: once, and of a crowd no more than a few."""
        if host in self._turned_away or len(self._turned_away) == _NOTED or not self._hosts:
            return
        self._turned_away.add(host)
        more = ". Others will be turned away without a word" if len(self._turned_away) == _NOTED else ""
        logger.warning(
            "%s at %s:%d turned a connection from %s away, because the hosts of this job are %s. If it is one of them,"
            " of several interfaces or behind NAT, name that by which the hosts reach each other with nics=[…]%s",
            type(self).__name__,
            *self._address,
            host,
            ", ".join(sorted(self._hosts)),
            more,
        )

    def _attend(self, guest: Guest, events: int) -> None:
        if events & selectors.EVENT_WRITE:
            self._tell(guest)
            return
        try:
            data = guest.connection.recv(_CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        guest.rest += data
        if data and self.heard(guest):
            return
        if data and guest.answer:
            self._selector.modify(guest.connection, selectors.EVENT_WRITE, guest)
        else:
            self._end(guest)

    def _tell(self, guest: Guest) -> None:
        """Send as much of an answer as goes out at once, and end the connection after the last of it."""
        try:
            guest.answer = guest.answer[guest.connection.send(guest.answer) :]
        except BlockingIOError:
            return
        except OSError:
            guest.answer = b""
        if not guest.answer:
            self._end(guest)

    def _end(self, guest: Guest) -> None:
        self._unproven.pop(guest, None)
        self._selector.unregister(guest.connection)
        guest.connection.close()
        self.left(guest)


def keep_alive(connection: socket.socket) -> None:
    """Have the system end a connection whose other end is cut off, after eleven seconds at most."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", _IDLE_S), ("TCP_KEEPINTVL", _PROBE_S), ("TCP_KEEPCNT", _PROBES)):
        if hasattr(socket, option):  # not all systems have them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        # Nobody probes while something that was said is on its way, and the system repeats it for a quarter of an hour.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * (_IDLE_S + _PROBE_S * _PROBES))
