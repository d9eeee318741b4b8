"""Pure: barrier tasks to ranks, and ranks to Horovod's environment."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass

from hvdspark.plan import RankContext

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Peer:
    """A barrier task, as it introduces itself to the others.

    Parameters
    ----------
    partition
        Partition number of the task.
    host
        Host name, as Spark knows it.
    address
        IP address by which other hosts can reach it.
    """

    partition: int
    host: str
    address: str


def assign_ranks(peers: Sequence[Peer]) -> dict[int, RankContext]:
    """Assign ranks host by host, so that local ranks are dense.

    Parameters
    ----------
    peers
        All tasks of the stage, in any order.

    Returns
    -------
    dict of int to RankContext
        By partition number. Hosts come in the order of their lowest partition, ranks of a host in the order of
        their partitions; every task computes the same.
    """
    ordered = sorted(peers, key=lambda peer: peer.partition)
    hosts = list(dict.fromkeys(peer.host for peer in ordered))
    by_host = {host: [peer for peer in ordered if peer.host == host] for host in hosts}
    contexts = {}
    rank = 0
    for host in hosts:
        for local_rank, peer in enumerate(by_host[host]):
            # Horovod's cross ring joins the ranks that have the same local rank on different hosts.
            alike = [name for name in hosts if len(by_host[name]) > local_rank]
            contexts[peer.partition] = RankContext(
                rank=rank,
                size=len(ordered),
                local_rank=local_rank,
                local_size=len(by_host[host]),
                cross_rank=alike.index(host),
                cross_size=len(alike),
                host=host,
            )
            rank += 1
    return contexts


def meeting_address(peers: Sequence[Peer], partition: int) -> str:
    """Return the address a task listens on: the loopback when all are on one host, else its own."""
    if len({peer.host for peer in peers}) == 1:
        return LOOPBACK
    return next(peer.address for peer in peers if peer.partition == partition)


def unreachable(peers: Sequence[Peer]) -> list[Peer]:
    """List the peers that a job over several hosts cannot reach, because all they offer is a loopback address."""
    if len({peer.host for peer in peers}) == 1:
        return []
    return [peer for peer in peers if ipaddress.ip_address(peer.address).is_loopback]


def rank_environment(context: RankContext) -> dict[str, str]:
    """Return the variables by which Horovod learns its place, whatever the control plane."""
    return {
        "HOROVOD_RANK": str(context.rank),
        "HOROVOD_SIZE": str(context.size),
        "HOROVOD_LOCAL_RANK": str(context.local_rank),
        "HOROVOD_LOCAL_SIZE": str(context.local_size),
        "HOROVOD_CROSS_RANK": str(context.cross_rank),
        "HOROVOD_CROSS_SIZE": str(context.cross_size),
        "HOROVOD_HOSTNAME": context.host,
    }
