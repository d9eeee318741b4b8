"""What Open MPI's ranks need of the process manager: servers of their hosts, and values that are waited for."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from hvdspark.errors import RendezvousError
from hvdspark.launch import openmpi
from hvdspark.launch.lines import connect
from hvdspark.launch.mpi import ProcessManager
from hvdspark.launch.openmpi import HostServer, variables_of_server
from hvdspark.launch.pmix import Manager

TOKEN = "0123456789abcdef"
# Two ranks on the first host, one on the second; the hosts' servers have the numbers after theirs.
PLACES = [0, 0, 1]
FIRST_SERVER, SECOND_SERVER = 3, 4


@pytest.fixture
def manager() -> Iterator[ProcessManager]:
    with ProcessManager("127.0.0.1", (), [0, 0, 0], TOKEN) as running:
        running.place(PLACES, servers=True)
        running.admit(["127.0.0.1"])
        yield running


@pytest.fixture
def members(manager: ProcessManager) -> Iterator[list[socket.socket]]:
    """The connections of all three ranks and both servers."""
    with contextlib.ExitStack() as stack:
        found = [stack.enter_context(connect(manager.address, TOKEN, number, 5)) for number in range(5)]
        for connection in found:
            connection.settimeout(10)
        yield found


def test_members_learn_the_jobs_name_and_who_is_where(members: list[socket.socket]) -> None:
    asked = [Manager(connection) for connection in members]
    assert len({manager.name for manager in asked}) == 1
    assert [manager.places for manager in asked] == [PLACES] * 5


@pytest.mark.parametrize("size", [0, 1, 768, 769, 5000])
def test_what_one_leaves_another_gets_even_if_it_comes_first(members: list[socket.socket], size: int) -> None:
    first, second = Manager(members[FIRST_SERVER]), Manager(members[SECOND_SERVER])
    data = bytes(range(256)) * 20
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(second.get, "fence")
        assert not waiting.done()
        first.put("fence", data[:size])
        assert waiting.result(10) == data[:size]
    assert second.get("fence") == data[:size]


def test_a_value_is_left_once_and_too_many_are_refused(members: list[socket.socket]) -> None:
    first, second = Manager(members[FIRST_SERVER]), Manager(members[SECOND_SERVER])
    first.put("fence", b"mine")
    with pytest.raises(ConnectionError, match="refused"):
        second.put("fence", b"forged")
    # A server may leave as much as its host has ranks.
    first.put("large", bytes(60_000))
    with pytest.raises(ConnectionError, match="refused"):
        second.put("flood", bytes(60_000))
    assert Manager(members[0]).get("fence") == b"mine"


def is_ended(connection: socket.socket) -> bool:
    try:
        return connection.recv(1) == b""
    except ConnectionResetError:
        return True


def is_open(connection: socket.socket) -> bool:
    return Manager(connection).places == PLACES


def test_a_server_stays_until_all_ranks_of_its_host_have_left(members: list[socket.socket]) -> None:
    members[0].close()
    assert is_open(members[1])
    assert is_open(members[FIRST_SERVER])
    members[1].close()
    assert is_ended(members[FIRST_SERVER])
    assert is_open(members[SECOND_SERVER])
    members[2].close()
    assert is_ended(members[SECOND_SERVER])


def test_ranks_that_wait_for_a_server_are_told_when_it_is_gone(members: list[socket.socket]) -> None:
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(variables_of_server, members[0], "0")
        members[FIRST_SERVER].close()
        with pytest.raises(ConnectionError, match="has ended the connection"):
            waiting.result(10)
    assert is_ended(members[1])
    assert is_open(members[2])


def test_a_server_that_does_not_start_says_why_and_is_gone(
    manager: ProcessManager, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = tmp_path / "libpmix.so.2"
    library.write_text("no library")
    monkeypatch.setattr(openmpi, "pmix_library", lambda: str(library))
    with pytest.raises(RendezvousError, match=r"PMIx server .*libpmix\.so\.2\) did not start: (.|\n)*OSError"):
        HostServer(manager.address, TOKEN, 0, len(PLACES), str(tmp_path))
    assert not psutil.Process().children(recursive=True)
    assert {path.name for path in tmp_path.iterdir()} == {library.name}


def test_an_address_that_is_no_managers_is_an_error(tmp_path: Path) -> None:
    """Run as a program of its own, as it is run."""
    mine, theirs = socket.socketpair()
    with mine, theirs:
        theirs.shutdown(socket.SHUT_WR)
        arguments = [str(mine.fileno()), "libpmix.so.2", "0", str(tmp_path)]
        program = [sys.executable, "-I", "-S", openmpi.pmix.__file__, *arguments]
        done = subprocess.run(program, pass_fds=[mine.fileno()], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert done.stdout == ""
