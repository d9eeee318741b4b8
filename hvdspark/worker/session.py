"""The Horovod session of a training process, and the collectives that are not gradients."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from hvdspark.errors import HvdSparkError, PeerLostError, RendezvousError
from hvdspark.launch.gloo import close_rendezvous
from hvdspark.plan import RankContext
from hvdspark.worker.shared_sum import CHUNK_BYTES, SharedSum

# Horovod's thread asks the peers in every cycle for collectives; with its usual 1 ms that takes a quarter of a core.
_CYCLE_TIME = "HOROVOD_CYCLE_TIME"
# A call of the user's own waits one cycle, and so does the shutdown. Under MPI the rank that comes first in a cycle
# looks for the others without pause until they come, and they stay as far behind in the next: so fewer cycles there.
_RESTING_CYCLE_MS, _RESTING_CYCLE_MPI_MS = "50", "200"
_DYNAMIC_SETS = "HOROVOD_DYNAMIC_PROCESS_SETS"

# Python's own 5 ms are how long a thread that computes keeps others from the interpreter: the one that is to put the
# gradients into the shared memory, for which all peers wait, behind one that reads rows.
_SWITCH_INTERVAL_S = 1e-4


def context_from_environment() -> RankContext:
    """Return this process's place, as the launcher set it."""
    get = os.environ
    return RankContext(
        rank=int(get["HOROVOD_RANK"]),
        size=int(get["HOROVOD_SIZE"]),
        local_rank=int(get["HOROVOD_LOCAL_RANK"]),
        local_size=int(get["HOROVOD_LOCAL_SIZE"]),
        cross_rank=int(get["HOROVOD_CROSS_RANK"]),
        cross_size=int(get["HOROVOD_CROSS_SIZE"]),
        host=get.get("HOROVOD_HOSTNAME", socket.gethostname()),
    )


class Session:
    """An initialized Horovod.

    Parameters
    ----------
    hvd
        The Horovod flavour's module.
    context
        This process's place.
    """

    def __init__(self, hvd: Any, context: RankContext) -> None:
        self.hvd = hvd
        self.context = context
        self._shared: SharedSum | None = None

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which alone writes."""
        return self.context.rank == 0

    def sum(self, values: npt.NDArray[np.float64], name: str) -> npt.NDArray[np.float64]:
        """Add an array up over all ranks.

        Parameters
        ----------
        values
            Shape ``(n,)``, the same on every rank.
        name
            Name of the collective, the same on every rank.
        """
        if self.context.size == 1 or not len(values):
            return values
        if self._shared is not None:
            return self._shared.add([values])[0]
        return np.asarray(self.hvd.allreduce(values, op=self.hvd.Sum, name=name))

    def gather(self, value: float, name: str) -> npt.NDArray[np.float64]:
        """Return a number of every rank, by rank; parameters as of :meth:`sum`."""
        values = np.zeros(self.context.size)
        values[self.context.rank] = value
        return self.sum(values, name)

    def any(self, flag: bool, name: str) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.sum(np.array([float(flag)]), name)[0] > 0)

    def gather_texts(self, text: str, name: str) -> list[str]:
        """Return a text of every rank, by rank; parameters as of :meth:`sum`."""
        data = np.frombuffer(text.encode(), np.uint8)
        lengths = self.gather(len(data), f"{name}_lengths").astype(int)
        table = np.zeros((self.context.size, int(lengths.max())))
        table[self.context.rank, : len(data)] = data
        found = self.sum(table.reshape(-1), name).reshape(table.shape).astype(np.uint8)
        return [row[:length].tobytes().decode() for row, length in zip(found, lengths, strict=True)]

    def raise_on(self, ranks: Sequence[int], error: HvdSparkError) -> NoReturn:
        """Raise an error that all ranks have come to know of, on those of them that caused it.

        The others wait for the end of these, as for that of any rank that fails: the driver is told who is to blame.

        Parameters
        ----------
        ranks
            Who caused it; where nobody did, it is raised on all.
        error
            What it is.

        Raises
        ------
        HvdSparkError
            The error.
        PeerLostError
            On the other ranks.
        """
        if not ranks or self.context.rank in ranks:
            raise error
        try:
            self.any(False, "hvdspark_end")
        except Exception as exc:
            raise PeerLostError(f"rank {ranks[0]} has ended: {error}") from exc
        raise error

    def open_shared_sum(self, chunk_bytes: int = CHUNK_BYTES) -> SharedSum:
        """Open memory that all ranks, being on one host, share.

        Raises
        ------
        OSError
            On all ranks when it failed on any.
        """
        own = np.frombuffer(secrets.token_bytes(16), np.uint8).astype(np.float64)
        token = self.sum(own if self.is_first else np.zeros_like(own), "hvdspark_address").astype(np.uint8).tobytes()
        shared, error = None, None
        try:
            shared = SharedSum(f"hvdspark-{token.hex()}", self.context.rank, self.context.size, chunk_bytes)
        except OSError as exc:
            error = exc
        failed = self.any(error is not None, "hvdspark_shared_memory")
        if shared is not None and not failed:
            return shared
        if shared is not None:
            shared.close()
        raise OSError(f"the ranks cannot share memory: {error or 'another rank could not open it'}") from error

    def rely_on(self, shared: SharedSum) -> None:
        """Make sums in shared memory from now on, and let Horovod, which stays at hand for the user's own code, rest.

        Horovod takes its cycle time when it starts; so it starts again.
        """
        self._shared = shared
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        if _CYCLE_TIME not in os.environ:
            self.hvd.shutdown()
            by_mpi = os.environ.get("HOROVOD_CONTROLLER") == "mpi"
            os.environ[_CYCLE_TIME] = _RESTING_CYCLE_MPI_MS if by_mpi else _RESTING_CYCLE_MS
            try:
                self.hvd.init()
            finally:
                del os.environ[_CYCLE_TIME]

    def settle(self) -> None:
        """Have the door shut by which ranks meet: on all of them Horovod is up, and will not be started again."""
        self.any(False, "hvdspark_settled")
        # Process sets that are made later meet there again.
        if self.is_first and _DYNAMIC_SETS not in os.environ:
            close_rendezvous()

    def close(self) -> None:
        """End the session, Horovod included."""
        if self._shared is not None:
            self._shared.close()
        self.hvd.shutdown()


@contextlib.contextmanager
def horovod_session(hvd: Any) -> Iterator[Session]:
    """Initialize Horovod for the time of a block.

    It is shut down only when the block succeeds: after an error the process ends, and its peers notice.

    Raises
    ------
    RendezvousError
        When Horovod comes up with another rank or size than the launcher gave.
    """
    context = context_from_environment()
    hvd.init()
    found = (hvd.rank(), hvd.size(), hvd.local_rank(), hvd.local_size())
    expected = (context.rank, context.size, context.local_rank, context.local_size)
    if found != expected:
        raise RendezvousError(
            f"Horovod came up as (rank, size, local rank, local size) {found}, but the launcher gave {expected}; is"
            " another launcher's environment set?"
        )
    session = Session(hvd, context)
    yield session
    session.close()
