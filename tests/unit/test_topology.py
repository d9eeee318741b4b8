"""Ranks from barrier tasks: dense per host, the same for every task."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from hvdspark.launch.topology import Peer, assign_ranks, meeting_address, places, rank_environment, unreachable
from hvdspark.plan import RankContext


def peers_on(*hosts: str) -> list[Peer]:
    return [Peer(partition, host, f"10.0.0.{host[1:]}") for partition, host in enumerate(hosts)]


def test_ranks_follow_hosts_so_that_local_ranks_are_dense() -> None:
    ranks = assign_ranks(peers_on("h2", "h1", "h2", "h1"))
    assert [(ranks[p].rank, ranks[p].host, ranks[p].local_rank) for p in range(4)] == [
        (0, "h2", 0),
        (2, "h1", 0),
        (1, "h2", 1),
        (3, "h1", 1),
    ]


def test_cross_ranks_join_equal_local_ranks_of_uneven_hosts() -> None:
    ranks = assign_ranks(peers_on("h1", "h2", "h2", "h3", "h3"))
    cross = {(r.host, r.local_rank): (r.cross_rank, r.cross_size) for r in ranks.values()}
    assert cross == {
        ("h1", 0): (0, 3),
        ("h2", 0): (1, 3),
        ("h3", 0): (2, 3),
        ("h2", 1): (0, 2),
        ("h3", 1): (1, 2),
    }


@given(st.lists(st.sampled_from(["h1", "h2", "h3", "h4"]), min_size=1, max_size=12), st.integers())
def test_every_task_computes_the_same_and_all_numbers_are_dense(hosts: list[str], seed: int) -> None:
    peers = peers_on(*hosts)
    shuffled = random.Random(seed).sample(peers, len(peers))
    ranks = assign_ranks(peers)
    assert assign_ranks(shuffled) == ranks
    assert sorted(context.rank for context in ranks.values()) == list(range(len(peers)))
    for host in set(hosts):
        own = sorted((c.local_rank, c.rank) for c in ranks.values() if c.host == host)
        assert [local for local, _ in own] == list(range(hosts.count(host)))
        assert [rank - own[0][1] for _, rank in own] == list(range(len(own)))


def test_one_host_meets_on_the_loopback_and_several_on_their_addresses() -> None:
    assert meeting_address(peers_on("h1", "h1"), 1) == "127.0.0.1"
    assert meeting_address(peers_on("h1", "h2"), 1) == "10.0.0.2"


def test_a_loopback_address_is_unreachable_only_from_other_hosts() -> None:
    lonely = [Peer(0, "h1", "127.0.0.1"), Peer(1, "h1", "127.0.0.1")]
    assert unreachable(lonely) == []
    assert unreachable([*lonely, Peer(2, "h2", "10.0.0.2")]) == lonely


def test_a_machine_is_one_by_whatever_names_spark_knows_it() -> None:
    peers = [Peer(0, "h1", "10.0.0.1", "A"), Peer(1, "h2", "10.0.0.2", "B"), Peer(2, "10.0.0.1", "10.0.0.1", "A")]
    ranks = assign_ranks(peers)
    # Gloo joins the ranks of a host by its name, so that is the same for all of them.
    assert [(ranks[p].rank, ranks[p].host, ranks[p].local_rank, ranks[p].local_size) for p in range(3)] == [
        (0, "h1", 0, 2),
        (2, "h2", 0, 1),
        (1, "h1", 1, 2),
    ]
    assert places(peers) == ["A", "B"]
    alone = [peers[0], peers[2]]
    assert [meeting_address(alone, partition) for partition in (0, 2)] == ["127.0.0.1", "127.0.0.1"]


def test_machines_of_the_same_name_are_told_apart() -> None:
    twins = [Peer(0, "node", "10.0.0.1", "A"), Peer(1, "node", "10.0.0.2", "B")]
    assert [(context.host, context.local_size) for context in assign_ranks(twins).values()] == [
        ("10.0.0.1", 1),
        ("10.0.0.2", 1),
    ]
    assert meeting_address(twins, 1) == "10.0.0.2"


def test_the_environment_tells_horovod_its_place() -> None:
    context = RankContext(rank=3, size=4, local_rank=1, local_size=2, cross_rank=1, cross_size=2, host="h2")
    assert rank_environment(context) == {
        "HOROVOD_RANK": "3",
        "HOROVOD_SIZE": "4",
        "HOROVOD_LOCAL_RANK": "1",
        "HOROVOD_LOCAL_SIZE": "2",
        "HOROVOD_CROSS_RANK": "1",
        "HOROVOD_CROSS_SIZE": "2",
        "HOROVOD_HOSTNAME": "h2",
    }
