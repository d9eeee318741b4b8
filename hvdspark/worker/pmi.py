"""Makes a training process a rank of an MPI job, with the job's process manager."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from hvdspark.errors import RendezvousError
from hvdspark.launch import mpi as mpich
from hvdspark.launch import openmpi
from hvdspark.launch.lines import connect
from hvdspark.launch.mpi import MANAGER, library_path

_CONNECT_TIMEOUT_S = 60.0


def join() -> Any:
    """Initialize MPI, where it is the control plane; waits for all ranks of the job.

    It is done ahead of the work. So MPI is not Horovod's own: Horovod can be shut down and started again, and the
    user's code can use it as well.

    Returns
    -------
    module or None
        ``mpi4py.MPI``, to be finalized when the work is done; ``None`` without MPI.

    Raises
    ------
    RendezvousError
        When nobody answers where ranks meet, or mpi4py uses another MPI than Horovod.
    ConnectionError
        When the host's PMIx server, which Open MPI needs, has ended.
    """
    manager = os.environ.pop(MANAGER, None)
    if manager is None:
        return None
    host, port, token = manager.rsplit(":", 2)
    rank, size = os.environ["HOROVOD_RANK"], os.environ["HOROVOD_SIZE"]
    connection = connect((host, int(port)), token, int(rank), _CONNECT_TIMEOUT_S)
    place = os.environ.pop(openmpi.PLACE, None)
    if place is None:
        os.environ.update(PMI_FD=str(connection.detach()), PMI_RANK=rank, PMI_SIZE=size)
    else:
        os.environ.update(openmpi.variables_of_server(connection, place), PMIX_RANK=rank)
        # As long as it is open, and that is until this process ends, the host's server stays.
        connection.detach()
    # The environment may have both, and mpi4py, which works with either, is to take Horovod's.
    os.environ.setdefault("MPI4PY_LIBMPI", library_path((mpich if place is None else openmpi).LIBRARY))
    mpi = importlib.import_module("mpi4py.MPI")
    if mpi.COMM_WORLD.size != int(size):
        ours = mpich.MPICH if place is None else openmpi.OPEN_MPI
        theirs = mpi.Get_library_version().partition("\n")[0].strip("\0")
        raise RendezvousError(
            f"mpi4py came up alone, on {theirs}, where Horovod was compiled for {ours}: have one MPI in the"
            " environment, and none chosen by MPI4PY_MPIABI"
        )
    # What the ranks of a host share has a name until MPI is finalized, which a rank that is killed never does. All of
    # them have it now, so the name goes.
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = Path(line.split(maxsplit=5)[-1])
        if path.match("/dev/shm/mpich_shm_*"):
            path.unlink(missing_ok=True)
    return mpi
