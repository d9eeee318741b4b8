"""The alarm: who hears it, and when."""

from __future__ import annotations

import contextlib
import select
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from hvdspark.errors import RendezvousError
from hvdspark.launch import alarm as alarm_module
from hvdspark.launch.alarm import Alarm, AlarmServer

TOKEN = "secret"
SIZE = 3
QUIET_S = 0.2


def rings(alarm: Alarm, within_s: float = 5.0) -> bool:
    return bool(select.select([alarm], [], [], within_s)[0])


@pytest.fixture
def alarms() -> Iterator[list[Alarm]]:
    with AlarmServer("127.0.0.1", ["127.0.0.1"], SIZE, TOKEN) as server, contextlib.ExitStack() as stack:
        hosts = [f"h{rank}" for rank in range(SIZE)]
        found = [stack.enter_context(Alarm(server.address, TOKEN, rank, hosts)) for rank in range(SIZE)]
        # All are known to the server before anything happens.
        deadline = time.monotonic() + 5
        while len(server.members) < SIZE and time.monotonic() < deadline:
            time.sleep(0.01)
        yield found


def test_all_others_hear_who_rings(alarms: list[Alarm]) -> None:
    alarms[1].ring()
    assert rings(alarms[0])
    assert rings(alarms[2])
    assert not rings(alarms[1], QUIET_S)
    assert alarms[0].cause() == alarms[2].cause() == ("rank 1 on h1 had failed", False)


def test_a_first_rank_that_cannot_be_reached_is_told_with_its_address_and_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = closed.getsockname()
    text = rf"the first rank's task does not answer at 127\.0\.0\.1:{address[1]}: .*Connection refused.*firewall.*nics="
    with pytest.raises(RendezvousError, match=text) as caught:
        Alarm(address, TOKEN, 1)
    assert caught.value.is_passing


def test_one_that_comes_late_hears_it_too() -> None:
    with AlarmServer("127.0.0.1", ["127.0.0.1"], 2, TOKEN) as server:
        with Alarm(server.address, TOKEN, 1) as early:
            early.ring()
            while not server.members:
                time.sleep(0.01)
        with Alarm(server.address, TOKEN, 0) as late:
            assert rings(late)
            late.through()


def test_a_task_that_is_gone_without_a_word_rings(alarms: list[Alarm]) -> None:
    with alarms[2]:
        pass
    assert rings(alarms[0])
    assert rings(alarms[1])
    assert alarms[1].cause() == ("the connection to rank 2 on h2 was lost", True)


def test_one_that_is_through_may_go_and_hears_nothing_more(alarms: list[Alarm]) -> None:
    alarms[0].through()
    with alarms[0]:
        pass
    assert not rings(alarms[1], QUIET_S)
    alarms[1].ring()
    assert rings(alarms[2])


def test_the_server_stays_until_all_are_through() -> None:
    ended = threading.Event()

    def serve(started: threading.Event, addresses: list[tuple[str, int]]) -> None:
        with AlarmServer("127.0.0.1", ["127.0.0.1"], 2, TOKEN) as server:
            addresses.append(server.address)
            started.set()
            while not server.members:
                time.sleep(0.01)
        ended.set()

    started, addresses = threading.Event(), list[tuple[str, int]]()
    thread = threading.Thread(target=serve, args=(started, addresses))
    thread.start()
    started.wait(5)
    with Alarm(addresses[0], TOKEN, 0) as alarm:
        assert not ended.wait(QUIET_S)
        alarm.through()
        assert ended.wait(5)
    thread.join()


def test_once_it_rings_the_server_leaves_without_those_that_never_are_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alarm_module, "RINGING_S", 0.5)
    with contextlib.ExitStack() as stack:
        with AlarmServer("127.0.0.1", ["127.0.0.1"], SIZE, TOKEN) as server:
            found = [stack.enter_context(Alarm(server.address, TOKEN, rank)) for rank in range(SIZE)]
            found[1].ring()
            assert rings(found[0])
            for rank in (0, 1):
                found[rank].through()
        # The block has ended, and the last one still holds its connection.
        assert server.members.keys() - server._through == {2}


def test_the_end_of_the_first_ranks_task_is_heard() -> None:
    server = AlarmServer("127.0.0.1", ["127.0.0.1"], 2, TOKEN)
    with pytest.raises(InterruptedError), server:  # noqa: PT012
        alarm = Alarm(server.address, TOKEN, 1)
        while not server.members:
            time.sleep(0.01)
        raise InterruptedError
    assert rings(alarm)
    assert alarm.cause() == ("the connection to rank 0 was lost", True)


@pytest.mark.parametrize("nonsense", [b"\xff\x00\n", b"ring 1 failed\n", b"\n" * 100, b"x" * 5000])
def test_a_task_that_speaks_nonsense_rings_as_one_that_has_failed(alarms: list[Alarm], nonsense: bytes) -> None:
    alarms[1]._connection.sendall(nonsense)
    assert rings(alarms[0])
    assert rings(alarms[2])
    cause, _ = alarms[0].cause()
    assert cause in ("rank 1 on h1 had failed", "the connection to rank 1 on h1 was lost")


def test_a_stranger_neither_rings_nor_hears() -> None:
    with AlarmServer("127.0.0.1", ["127.0.0.1"], 2, TOKEN) as server, Alarm(server.address, TOKEN, 0) as alarm:
        with socket.create_connection(server.address, timeout=5) as stranger:
            stranger.sendall(b"wrong 1\nring\n")
            assert stranger.recv(10) == b""
        assert not rings(alarm, QUIET_S)
        alarm.through()


def test_when_all_are_there_nobody_else_gets_in(alarms: list[Alarm]) -> None:
    address = alarms[0]._connection.getpeername()[:2]
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=5)
    alarms[1].ring()
    assert rings(alarms[0])
