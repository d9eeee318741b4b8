"""Pure: barrier tasks to ranks, and ranks to Horovod's environment."""

from __future__ import annotations

import ipaddress
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
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
    machine
        What tells its machine from others, see :func:`hvdspark.launch.devices.machine`; empty until the tasks have
        met. Spark may know a machine by several names.
    """

    partition: int
    host: str
    address: str
    machine: str = ""

    @property
    def place(self) -> str:
        """What it shares with the peers on its machine, as far as that is known."""
        return self.machine or self.host


def assign_ranks(peers: Sequence[Peer]) -> dict[int, RankContext]:
    """Assign ranks machine by machine, so that local ranks are dense.

    Parameters
    ----------
    peers
        All tasks of the stage, in any order.

    Returns
    -------
    dict of int to RankContext
        By partition number. Machines come in the order of their lowest partition, ranks of a machine in the order of
        their partitions; every task computes the same. The lowest partition has rank 0, whatever the machines.
    """
    ordered = sorted(peers, key=lambda peer: peer.partition)
    by_place = {place: [peer for peer in ordered if peer.place == place] for place in places(ordered)}
    names = _names(by_place)
    contexts = {}
    rank = 0
    for place, here in by_place.items():
        for local_rank, peer in enumerate(here):
            # Horovod's cross ring joins the ranks that have the same local rank on different hosts.
            alike = [name for name, there in by_place.items() if len(there) > local_rank]
            contexts[peer.partition] = RankContext(
                rank=rank,
                size=len(ordered),
                local_rank=local_rank,
                local_size=len(here),
                cross_rank=alike.index(place),
                cross_size=len(alike),
                host=names[place],
            )
            rank += 1
    return contexts


def places(peers: Iterable[Peer]) -> list[str]:
    """List the machines, each once, in the order of the peers."""
    return list(dict.fromkeys(peer.place for peer in peers))


def _names(by_place: Mapping[str, Sequence[Peer]]) -> dict[str, str]:
    """Name every machine: as Spark knows its first peer, or by address where two machines have the same name."""
    first = {place: here[0] for place, here in by_place.items()}
    counts = Counter(peer.host for peer in first.values())
    # Gloo joins the ranks of a host by this name, so one name for two machines would not do.
    return {place: peer.host if counts[peer.host] == 1 else peer.address for place, peer in first.items()}


def host_numbers(ranks: Mapping[int, RankContext]) -> list[int]:
    """Return for each rank the number of its host, in the order of the hosts' first ranks."""
    hosts = [context.host for context in sorted(ranks.values(), key=lambda context: context.rank)]
    numbers = {host: number for number, host in enumerate(dict.fromkeys(hosts))}
    return [numbers[host] for host in hosts]


def meeting_address(peers: Sequence[Peer], partition: int) -> str:
    """Return the address a task listens on: the loopback when all are on one host, else its own."""
    if len(places(peers)) == 1:
        return LOOPBACK
    return next(peer.address for peer in peers if peer.partition == partition)


def unreachable(peers: Sequence[Peer]) -> list[Peer]:
    """List the peers that a job over several hosts cannot reach, because all they offer is a loopback address."""
    if len(places(peers)) == 1:
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
