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
import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

from hvdspark.launch.lines import LineServer, Member, connect
from hvdspark.launch.process import END_TIMEOUT_S

_RING, _THROUGH = "ring", "through"
_FAILED, _LOST = "failed", "lost"
_LINE_BYTES = 4096
_CONNECT_TIMEOUT_S = 30.0

# Within which tasks are through once it rings: they listen to what their ranks have to say, look at what these are
# doing, and end them. It is less than the driver waits for a task after others have failed.
RINGING_S = END_TIMEOUT_S + 3.5


class AlarmServer(LineServer):
    """Passes the alarm on; runs beside the first rank.

    Leaving its block without an error waits for all tasks; once the alarm has rung, no longer than they need.
    """

    def __init__(self, address: str, hosts: Iterable[str], size: int, token: str) -> None:
        super().__init__(address, hosts, size, token)
        self._through: set[int | None] = set()
        self._rung: str | None = None
        self._rung_at = 0.0
        self._changed = threading.Condition()

    def __exit__(self, *exc_info: object) -> None:
        # The others would take its end for an alarm.
        if exc_info[0] is None:
            with self._changed:
                self._changed.wait_for(lambda: self._rung is not None or self._are_through())
                self._changed.wait_for(self._are_through, self._rung_at + RINGING_S - time.monotonic())
        super().__exit__(*exc_info)

    def _are_through(self) -> bool:
        return self._through >= self.members.keys()

    def obey(self, member: Member, line: str) -> bool:
        """Ring for the others, or note that a rank is through."""
        if line == _THROUGH:
            self._note_end(member)
        else:
            self._ring(member, _FAILED)
        return True

    def joined(self, member: Member) -> None:
        """Ring for one that comes after the others have heard it."""
        if self._rung is not None:
            member.say(self._rung)

    def lost(self, member: Member) -> None:
        """Ring for the others, unless this one was through."""
        if member.number not in self._through:
            self._ring(member, _LOST)
            self._note_end(member)

    def _ring(self, cause: Member, how: str) -> None:
        # What came first is the cause of what came after.
        if self._rung is None:
            with self._changed:
                self._rung, self._rung_at = f"{_RING} {cause.number} {how}", time.monotonic()
                self._changed.notify()
        for other in self.members.values():
            if other is not cause and other.number not in self._through:
                other.say(self._rung)

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
    hosts
        The hosts of all ranks.

    Raises
    ------
    RendezvousError
        When the server is not there.
    """

    def __init__(self, address: tuple[str, int], token: str, rank: int, hosts: Sequence[str] = ()) -> None:
        self._hosts = hosts
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

    def cause(self) -> tuple[str, bool]:
        """Say why it rings, once it does, and whether that is a connection that was lost rather than a rank."""
        try:
            said = self._connection.recv(_LINE_BYTES, socket.MSG_DONTWAIT).decode()
        except OSError:
            said = ""
        words = said.partition("\n")[0].split()
        if len(words) != 3:
            return f"the connection to {self._name(0)} was lost", True
        name = self._name(int(words[1]))
        return (f"{name} had failed", False) if words[2] == _FAILED else (f"the connection to {name} was lost", True)

    def ring(self) -> None:
        """Tell the others that this rank has failed."""
        self._say(_RING)

    def through(self) -> None:
        """Say that this rank is through; its connection may end now."""
        self._say(_THROUGH)

    def _name(self, rank: int) -> str:
        return f"rank {rank} on {self._hosts[rank]}" if rank < len(self._hosts) else f"rank {rank}"

    def _say(self, text: str) -> None:
        # A server that is gone has made everybody's alarm ring already.
        with contextlib.suppress(OSError):
            self._connection.sendall(text.encode() + b"\n")
