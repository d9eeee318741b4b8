"""The doors of a job: whatever strangers do at them, the members get in, and are heard."""

from __future__ import annotations

import contextlib
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdspark.launch import door
from hvdspark.launch.alarm import AlarmServer
from hvdspark.launch.door import Door
from hvdspark.launch.gloo import RendezvousServer
from hvdspark.launch.mpi import ProcessManager

TOKEN = "0123456789abcdef"
HOME = "127.0.0.1"
CROWD = 400


@dataclass(frozen=True)
class Kind:
    """A server, and what a member says to it and hears."""

    make: Callable[[], Door]
    words: bytes
    answer: bytes


KINDS = {
    "rendezvous": Kind(
        lambda: RendezvousServer(HOME, [HOME], 2, TOKEN),
        f"PUT /{TOKEN}:1/global/rank_0 HTTP/1.1\r\nContent-Length: 1\r\n\r\nx".encode(),
        b"HTTP/1.1 200",
    ),
    "process manager": Kind(
        lambda: ProcessManager(HOME, [HOME], [0, 0], TOKEN), f"{TOKEN} 1\ncmd=get_appnum\n".encode(), b"cmd=appnum"
    ),
    "alarm": Kind(lambda: AlarmServer(HOME, [HOME], 2, TOKEN), f"{TOKEN} 1\n".encode(), b"ring"),
}


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@contextmanager
def running(kind: Kind) -> Iterator[Door]:
    """Run a server; an alarm has been rung, so that whoever is a member hears it at once."""
    with kind.make() as server, contextlib.ExitStack() as stack:
        if isinstance(server, AlarmServer):
            first = stack.enter_context(stranger(server))
            first.sendall(f"{TOKEN} 0\nring\nthrough\n".encode())
            while server.members.keys() != {0}:
                time.sleep(0.001)
        yield server


def stranger(server: Door, source: str = HOME) -> socket.socket:
    return socket.create_connection(server.address, timeout=10, source_address=(source, 0))


def is_served(server: Door, kind: Kind) -> bool:
    """Whether a member that comes now is answered."""
    with stranger(server) as member:
        member.sendall(kind.words)
        heard = member.recv(len(kind.answer), socket.MSG_WAITALL)
        if isinstance(server, AlarmServer):
            member.sendall(b"through\n")
        return heard == kind.answer


def is_ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(100) == b""
    except ConnectionResetError:
        return True


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_a_crowd_from_hosts_that_are_not_of_the_job_keeps_nobody_out(kind: Kind) -> None:
    with running(kind) as server, contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(stranger(server, f"127.0.0.{2 + number % 250}")) for number in range(CROWD)]
        assert is_served(server, kind)
        assert all(map(is_ended, crowd))


def test_of_those_turned_away_a_few_are_told_once_each(kind: Kind, caplog: pytest.LogCaptureFixture) -> None:
    strangers = [f"127.0.0.{number}" for number in range(2, 32)]
    with running(kind) as server:
        for source in [*strangers[:3], *strangers]:
            with stranger(server, source) as connection:
                connection.sendall(b"GET /what-strangers-say HTTP/1.1\r\n\r\n")
                assert is_ended(connection)
        assert is_served(server, kind)
    told = [re.search(r"turned a connection from (\S+) away", line) for line in caplog.messages]
    assert [found[1] for found in told if found] == strangers[:8]
    assert "the hosts of this job are 127.0.0.1. If it is one of them" in caplog.messages[0]
    assert "Others will be turned away without a word" in caplog.messages[-1]
    assert "what-strangers-say" not in caplog.text


def test_a_silent_crowd_from_a_host_of_the_job_keeps_nobody_out_and_holds_little(kind: Kind) -> None:
    descriptors = open_descriptors()
    with running(kind) as server, contextlib.ExitStack() as stack:
        crowd = [stack.enter_context(stranger(server)) for _ in range(CROWD)]
        assert is_served(server, kind)
        # Those who came first went first; no more are held than may wait.
        assert is_ended(crowd[0])
        held = open_descriptors() - descriptors - CROWD
        assert held < door.WAITING_ROOM + 50


@pytest.mark.parametrize(
    "beginning", [b"", b"GET /", TOKEN.encode(), b"PUT /%s:1/global/0 HTTP/1.1\r\n" % TOKEN.encode()]
)
def test_who_says_nothing_whole_in_time_is_sent_away(kind: Kind, beginning: bytes) -> None:
    with mock.patch.object(door, "PATIENCE_S", 0.2), running(kind) as server, stranger(server) as slow:
        slow.sendall(beginning)
        assert is_ended(slow)
        assert is_served(server, kind)


def test_a_member_may_be_silent_for_as_long_as_it_likes() -> None:
    kind = KINDS["process manager"]
    with mock.patch.object(door, "PATIENCE_S", 0.1), running(kind) as server, stranger(server) as member:
        member.sendall(f"{TOKEN} 0\n".encode())
        with stranger(server) as other:
            assert is_ended(other)  # so the time was up for both
        member.sendall(b"cmd=get_appnum\n")
        assert member.recv(100).startswith(b"cmd=appnum")


# What strangers may send: anything, and what looks nearly like the real thing.
NEARLY = st.builds(
    b"%s /%s:%s/%s HTTP/1.1\r\nContent-Length: %s\r\n\r\n%s".__mod__,
    st.tuples(
        st.sampled_from([b"GET", b"PUT", b"DELETE", b"POST", b""]),
        st.sampled_from([TOKEN[:-1].encode(), b"", b"..", b"%00"]),
        st.binary(max_size=4),
        st.sampled_from([b"global/0", b"local_x/0", b"../0", b"", b"/", b"global/0/0"]),
        st.sampled_from([b"0", b"-1", b"9" * 30, b"1", b"x"]),
        st.binary(max_size=20),
    ),
)
LINES = st.builds(
    b"%s %s\n%s\n".__mod__,
    st.tuples(
        st.sampled_from([TOKEN.encode(), TOKEN[1:].encode(), b""]),
        st.sampled_from([b"2", b"-1", b"9" * 4090, b"x", b"", b"\xff"]),
        st.binary(max_size=30),
    ),
)


@pytest.mark.parametrize("name", list(KINDS))
@settings(max_examples=30)
@given(st.lists(st.binary(max_size=200) | NEARLY | LINES, min_size=1, max_size=4))
def test_no_bytes_keep_members_out(name: str, said: list[bytes]) -> None:
    kind = KINDS[name]
    with running(kind) as server:
        for data in said:
            with stranger(server) as garbage, contextlib.suppress(ConnectionError):
                garbage.sendall(data)
        assert is_served(server, kind)
        if isinstance(server, RendezvousServer):
            assert server._scopes == {"global": {"rank_0": b"x"}}


# The first member's own bytes, with nonsense in them.
@pytest.mark.parametrize("name", list(KINDS))
@settings(max_examples=30)
@given(st.binary(max_size=100), st.integers(0, 60))
def test_a_member_that_speaks_nonsense_harms_nobody_else(name: str, nonsense: bytes, place: int) -> None:
    kind, number = KINDS[name], 0
    if name == "alarm":  # which has its first member already
        kind, number = replace(kind, make=lambda: AlarmServer(HOME, [HOME], 3, TOKEN)), 2
    words = kind.words.replace(b" 1\n", b" %d\n" % number).replace(b"rank_0", b"rank_1")
    with running(kind) as server:
        with stranger(server) as member, contextlib.suppress(ConnectionError):
            member.sendall(words[:place] + nonsense + words[place:])
        assert is_served(server, kind)


def test_an_address_that_is_not_of_this_host_is_named_with_what_to_do() -> None:
    text = r"nothing can listen at 192\.0\.2\.1, where ranks are to meet: .*Cannot assign.*nics="
    with pytest.raises(OSError, match=text):
        ProcessManager("192.0.2.1", [HOME], [0, 0], TOKEN)
