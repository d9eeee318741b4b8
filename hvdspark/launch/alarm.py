"""The alarm between the tasks of a job: where one rank fails, all others are stopped at once.

A rank that waits in a collective for one that is gone may wait for long: under MPI for ever, under Gloo for its
timeout, where the other's host is cut off. So every task holds a connection to the first rank's task. One that rings,
or whose connection ends before its rank was through, has all others ring; and when the first rank's task itself is
gone, so are the connections.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterable
from types import TracebackType
from typing import Self

from hvdspark.launch.lines import LineServer, Member, connect

_RING, _THROUGH = "ring", "through"
_CONNECT_TIMEOUT_S = 30.0


class AlarmServer(LineServer):
    """Passes the alarm on; runs beside the first rank. Leaving its block without an error waits for all tasks."""

    def __init__(self, address: str, hosts: Iterable[str], size: int, token: str) -> None:
        super().__init__(address, hosts, size, token)
        self._through: set[int | None] = set()
        self._has_rung = False
        self._changed = threading.Condition()

    def __exit__(self, *exc_info: object) -> None:
        # The others would take its end for an alarm.
        if exc_info[0] is None:
            with self._changed:
                self._changed.wait_for(lambda: self._through >= self.members.keys())
        super().__exit__(*exc_info)

    def obey(self, member: Member, line: str) -> bool:
        """Ring for the others, or note that a rank is through."""
        if line == _THROUGH:
            self._note_end(member)
        else:
            self._ring(member)
        return True

    def joined(self, member: Member) -> None:
        """Ring for one that comes after the others have heard it."""
        if self._has_rung:
            member.say(_RING)

    def lost(self, member: Member) -> None:
        """Ring for the others, unless this one was through."""
        if member.number not in self._through:
            self._ring(member)
            self._note_end(member)

    def _ring(self, cause: Member) -> None:
        self._has_rung = True
        for other in self.members.values():
            if other is not cause and other.number not in self._through:
                other.say(_RING)

    def _note_end(self, member: Member) -> None:
        with self._changed:
            self._through.add(member.number)
            self._changed.notify()


class Alarm:
    """A task's end of the alarm; a context manager.

    Parameters
    ----------
    address, token
        Where the server is, and its token.
    rank
        The task's rank.

    Raises
    ------
    OSError
        When the server is not there.
    """

    def __init__(self, address: tuple[str, int], token: str, rank: int) -> None:
        self._connection: socket.socket = connect(address, token, rank, _CONNECT_TIMEOUT_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.close()

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when the alarm rings."""
        return self._connection.fileno()

    def ring(self) -> None:
        """Tell the others that this rank has failed."""
        self._say(_RING)

    def through(self) -> None:
        """Say that this rank is through; its connection may end now."""
        self._say(_THROUGH)

    def _say(self, text: str) -> None:
        # A server that is gone has made everybody's alarm ring already.
        with contextlib.suppress(OSError):
            self._connection.sendall(text.encode() + b"\n")
