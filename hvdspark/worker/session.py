"""The Horovod session of a training process, and the collectives that are not gradients."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from hvdspark.errors import RendezvousError
from hvdspark.plan import RankContext


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
        return np.asarray(self.hvd.allreduce(values, op=self.hvd.Sum, name=name))

    def any(self, flag: bool, name: str) -> bool:
        """Whether the flag is set on any rank."""
        return bool(self.sum(np.array([float(flag)]), name)[0] > 0)


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
    yield Session(hvd, context)
    hvd.shutdown()
