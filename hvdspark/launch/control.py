"""The control planes by which ranks can meet: what each needs of a task, and which one a job takes."""

from __future__ import annotations

import contextlib
import ctypes.util
import importlib.util
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from hvdspark.launch import mpi, openmpi, topology
from hvdspark.launch.gloo import RendezvousServer, gloo_environment
from hvdspark.launch.lines import LineServer
from hvdspark.launch.mpi import ProcessManager, mpi_environment

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


def admit(
    servers: Mapping[str, LineServer | RendezvousServer], peers: Sequence[topology.Peer], plane: str, mpi_name: str
) -> None:
    """Let the tasks in, now that they have met and it is known where they are.

    Parameters
    ----------
    servers
        What is open beside the first rank, by name.
    peers
        All tasks, with their addresses and machines.
    plane
        The control plane chosen; the server of another, to which nobody will come, is closed.
    mpi_name
        The MPI of all hosts, if they have the same.
    """
    # A server that was opened before it was known that all are on one machine listens on its address.
    hosts = {peer.address for peer in peers} | {topology.meeting_address(peers, peer.partition) for peer in peers}
    places = topology.host_numbers(topology.assign_ranks(peers))
    for name, server in servers.items():
        if name in PLANES and name != plane:
            server.close()
            continue
        if isinstance(server, ProcessManager):
            server.place(places, servers=mpi_name == openmpi.OPEN_MPI)
        server.admit(hosts)


def environment_of(plane: str, address: Address, token: str, interface: str) -> Mapping[str, str]:
    """Return the variables by which a rank meets the others at an address, and talks over one interface."""
    if plane == "mpi":
        return mpi_environment(address, token)
    return gloo_environment(address, token, interface)


def choose(controller: str, *, hosts: int, mpis: Collection[str], all_have_rdma: bool) -> tuple[str, str]:
    """Decide on a control plane; every task comes to the same.

    Parameters
    ----------
    controller
        What the user wants: one of `CONTROLLERS`.
    hosts
        How many there are.
    mpis
        The MPIs of all hosts; an empty name for a host without.
    all_have_rdma
        Whether each of them has an RDMA device that is up and may be used.

    Returns
    -------
    plane, reason : str
    """
    if controller in PLANES:
        return controller, "as asked for"
    if hosts == 1:
        return "gloo", "all ranks are on one host"
    if "" in mpis:
        return "gloo", "not every host has an MPI library"
    if len(set(mpis)) > 1:
        return "gloo", f"the hosts have different MPIs, {' and '.join(sorted(set(mpis)))}"
    if not all_have_rdma:
        return "gloo", "not every host has an RDMA device that is up and may be used, and without one MPI is not ahead"
    return "mpi", "all hosts have RDMA devices, which Gloo cannot use"


def find_mpi() -> tuple[str, str]:
    """Say by which MPI the ranks of this host can meet, or why by none.

    It is the one that Horovod was compiled for. MPICH's ranks and those of its relatives ask the tasks themselves for
    their places (PMI-1), Open MPI's a server that comes with its own library (PMIx).

    Returns
    -------
    name, hindrance : str
        One of them is empty.
    """
    libraries = _compiled_against()
    if libraries and not libraries & {mpi.LIBRARY, openmpi.LIBRARY}:
        return "", (
            f"Horovod was compiled for neither MPICH ({mpi.LIBRARY}) nor Open MPI ({openmpi.LIBRARY}); install the"
            " wheel of Horovod that ci/wheels makes"
        )
    if openmpi.LIBRARY in libraries:
        if not _is_installed(openmpi.LIBRARY):
            if ctypes.util.find_library("mpi") != openmpi.LIBRARY:
                return "", _missing(openmpi.OPEN_MPI, openmpi.LIBRARY, "openmpi")
            if ctypes.util.find_library("open-pal") == openmpi.OLD_PART:
                return "", (
                    "the system's Open MPI is of version 4, whose ranks only its own mpirun can start; install the"
                    " package openmpi, which is of version 5"
                )
        if openmpi.pmix_library() is None:
            return "", _missing("PMIx, of which Open MPI's ranks ask their places,", "libpmix.so.2", "openmpi")
        return openmpi.OPEN_MPI, ""
    if not _is_installed(mpi.LIBRARY) and ctypes.util.find_library("mpich") is None:
        return "", _missing(mpi.MPICH, mpi.LIBRARY, "mpich")
    return mpi.MPICH, ""


def mpi_hindrance() -> str | None:
    """Say why ranks of this host cannot meet by MPI, if so."""
    return find_mpi()[1] or None


def _is_installed(library: str) -> bool:
    """Whether this environment has a library of its own."""
    return Path(sys.prefix, "lib", library).exists()


def _missing(what: str, library: str, package: str) -> str:
    where = f"{sys.prefix}/lib or among the system's libraries"
    return f"there is no {what} ({library}) in {where}; install the package {package}"


def _compiled_against() -> set[str]:
    """Return which MPI libraries Horovod's own need; empty where there is no Horovod. Imports nothing."""
    spec = importlib.util.find_spec("horovod")
    folders = (spec.submodule_search_locations or []) if spec is not None else []
    found = set()
    for library in (path for folder in folders for path in Path(folder).glob("*/mpi_lib*.so")):
        content = library.read_bytes()
        # Their names are in a list of their own, each with a zero at its end.
        needed = {name for name in (mpi.LIBRARY, openmpi.LIBRARY) if f"\0{name}\0".encode() in content}
        found |= needed or {"none"}
    return found
