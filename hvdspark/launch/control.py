"""The control planes by which ranks can meet: what each needs of a task, and which one a job takes."""

from __future__ import annotations

import contextlib
import ctypes.util
import importlib.util
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hvdspark.launch import topology
from hvdspark.launch.gloo import RendezvousServer, gloo_environment
from hvdspark.launch.lines import LineServer
from hvdspark.launch.mpi import ProcessManager, mpi_environment

MPICH, OPEN_MPI = "libmpi.so.12", "libmpi.so.40"

PLANES = ("gloo", "mpi")
CONTROLLERS = (*PLANES, "auto")

Address = tuple[str, int]
Server = RendezvousServer | ProcessManager


def open_servers(
    controller: str, peers: Sequence[topology.Peer], own: int, token: str, stack: contextlib.ExitStack
) -> dict[str, Server]:
    """Open what ranks meet at, beside the first rank; it admits nobody yet.

    Parameters
    ----------
    controller
        What the user wants; for ``"auto"`` a server of each kind is opened.
    peers, own
        All tasks, and the partition of this one, whose address is known.
    token
        What a rank must know to be one.
    stack
        What closes the servers.

    Returns
    -------
    dict of str to server
        By control plane.
    """
    address = topology.meeting_address(peers, own)
    found: dict[str, Server] = {}
    if controller in ("gloo", "auto"):
        found["gloo"] = stack.enter_context(RendezvousServer(address, (), len(peers), token))
    if controller in ("mpi", "auto"):
        found["mpi"] = stack.enter_context(ProcessManager(address, (), [0] * len(peers), token))
    return found


def admit(servers: Iterable[LineServer | RendezvousServer], peers: Sequence[topology.Peer]) -> None:
    """Let the tasks in, now that they have met and it is known where they are.

    Parameters
    ----------
    servers
        What is open beside the first rank.
    peers
        All tasks, with their addresses and machines.
    """
    # A server that was opened before it was known that all are on one machine listens on its address.
    hosts = {peer.address for peer in peers} | {topology.meeting_address(peers, peer.partition) for peer in peers}
    ranks = sorted(topology.assign_ranks(peers).values(), key=lambda context: context.rank)
    names = list(dict.fromkeys(context.host for context in ranks))
    for server in servers:
        if isinstance(server, ProcessManager):
            server.place([names.index(context.host) for context in ranks])
        server.admit(hosts)


def environment_of(plane: str, address: Address, token: str, interface: str) -> Mapping[str, str]:
    """Return the variables by which a rank meets the others at an address, and talks over one interface."""
    if plane == "mpi":
        return mpi_environment(address, token)
    return gloo_environment(address, token, interface)


def choose(controller: str, *, hosts: int, all_have_mpi: bool, all_have_rdma: bool) -> tuple[str, str]:
    """Decide on a control plane; every task comes to the same.

    Parameters
    ----------
    controller
        What the user wants: one of `CONTROLLERS`.
    hosts
        How many there are.
    all_have_mpi, all_have_rdma
        Whether each of them has an MPI library, and an RDMA device that is up.

    Returns
    -------
    plane, reason : str
    """
    if controller in PLANES:
        return controller, "as asked for"
    if hosts == 1:
        return "gloo", "all ranks are on one host"
    if not all_have_mpi:
        return "gloo", "not every host has an MPI library"
    if not all_have_rdma:
        return "gloo", "not every host has an RDMA device that is up, and without one MPI is not ahead"
    return "mpi", "all hosts have RDMA devices, which Gloo cannot use"


def mpi_hindrance() -> str | None:
    """Say why ranks of this host cannot meet by MPI, if so.

    The tasks are the ranks' process manager and speak PMI-1, as MPICH and its relatives do. Open MPI does not: each of
    its ranks would come up as a job of one.
    """
    libraries = _compiled_against()
    if libraries and MPICH not in libraries:
        found = "for Open MPI (libmpi.so.40)" if OPEN_MPI in libraries else "without MPICH"
        return (
            f"Horovod was compiled {found}, and MPI ranks are started as those of MPICH ({MPICH}); install the wheel of"
            " Horovod that ci/wheels makes, which comes with the package mpich"
        )
    if not Path(sys.prefix, "lib", MPICH).exists() and ctypes.util.find_library("mpich") is None:
        where = f"{sys.prefix}/lib or among the system's libraries"
        return f"there is no MPICH ({MPICH}) in {where}; install the package mpich"
    return None


def _compiled_against() -> set[str]:
    """Return which MPI libraries Horovod's own need; empty where there is no Horovod. Imports nothing."""
    spec = importlib.util.find_spec("horovod")
    folders = (spec.submodule_search_locations or []) if spec is not None else []
    found = set()
    for library in (path for folder in folders for path in Path(folder).glob("*/mpi_lib*.so")):
        content = library.read_bytes()
        # Their names are in a list of their own, each with a zero at its end.
        needed = {name for name in (MPICH, OPEN_MPI) if f"\0{name}\0".encode() in content}
        found |= needed or {"none"}
    return found
