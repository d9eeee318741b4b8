"""A small server for the processes of one job, to which they say lines of text.

It takes from those who come to its door (:mod:`hvdspark.launch.door`) only who knows the job's token and a number that
nobody has yet; when all members are there, the door is shut.
"""

from __future__ import annotations

import hmac
import socket
from collections.abc import Iterable
from dataclasses import dataclass

from hvdspark.errors import RendezvousError
from hvdspark.launch.door import Door, Guest, keep_alive

_LINE_BYTES = 4096
_NUMBER_DIGITS = 9


@dataclass(eq=False)
class Member(Guest):
    """Somebody at the other end of a connection; of the job once it has a number."""

    number: int | None = None

    def say(self, text: str) -> bool:
        """Send a line; ``False`` when it does not go out at once, which a member that listens never causes."""
        try:
            self.connection.sendall(text.encode() + b"\n")
        except OSError:
            return False
        return True


class LineServer(Door):
    """Answers the members of a job; alive while the job runs. Use as a context manager.

    Parameters
    ----------
    address, hosts, size
        As for :class:`~hvdspark.launch.door.Door`.
    token
        What one must know to be a member.
    """

    _guest_type = Member

    def __init__(self, address: str, hosts: Iterable[str], size: int, token: str) -> None:
        super().__init__(address, hosts, size)
        self.members: dict[int, Member] = {}
        self._token = token.encode()

    def obey(self, member: Member, line: str) -> bool:
        """Do as a member says; ``False`` ends its connection."""
        raise NotImplementedError

    def joined(self, member: Member) -> None:
        """Note that a member has come."""

    def lost(self, member: Member) -> None:
        """Note that a member's connection has ended."""

    def heard(self, guest: Guest) -> bool:
        """Take the lines that are whole."""
        assert isinstance(guest, Member)
        *lines, guest.rest = guest.rest.split(b"\n")
        return len(guest.rest) <= _LINE_BYTES and all(self._take(guest, line) for line in lines)

    def left(self, guest: Guest) -> None:
        """Tell it where it was a member."""
        assert isinstance(guest, Member)
        if guest.number is not None:
            self.lost(guest)

    def _take(self, member: Member, line: bytes) -> bool:
        if member.number is not None:
            return self.obey(member, line.decode("ascii", "replace"))
        token, _, number = line.partition(b" ")
        if not hmac.compare_digest(token, self._token) or not number.isdigit() or len(number) > _NUMBER_DIGITS:
            return False
        # One that was here may not come again either: there is only one of each.
        if int(number) >= self.size or int(number) in self.members:
            return False
        member.number = int(number)
        self.members[member.number] = member
        self._recognize(member)
        if len(self.members) == self.size:
            self._shut()
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
    RendezvousError
        When nobody answers there.
    """
    try:
        connection = socket.create_connection(address, timeout=timeout_s)
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        keep_alive(connection)
        connection.sendall(f"{token} {number}\n".encode())
    except OSError as exc:
        host, port = address
        raise RendezvousError(
            f"the first rank's task does not answer at {host}:{port}: {exc}. Where no other rank tells of an error, it"
            " is a firewall (ranks use ports that the system chooses), or an address that other hosts have no way to:"
            " name another interface with nics=[…]. hvdspark doctor tells which executors do not reach each other.",
            is_passing=True,
        ) from exc
    return connection
