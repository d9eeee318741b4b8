"""Ranks on several hosts: who is where, over what they talk, and what listens."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from clusters import KERAS_RANK
from networks import NAMES, NETWORKS, SLOTS, Site, rdma_on
from openmpi_environment import as_imported, executors_on, openmpi_python  # noqa: F401 - fixtures
from pyspark.sql import SparkSession

import hvdspark
from hvdspark.errors import RendezvousError
from hvdspark.launch.alarm import AlarmServer
from hvdspark.launch.lines import connect

SIZE = sum(SLOTS.values())


def place() -> dict[str, Any]:
    """Say where this rank is, what the sums over all ranks are, and which of this host's sockets are not Java's."""
    import horovod.tensorflow as hvd
    import tensorflow as tf

    hvd.init()
    total = hvd.allreduce(tf.range(3.0) * (hvd.rank() + 1), op=hvd.Sum, name="all")
    by_mpi = None
    if hvd.mpi_enabled():
        from mpi4py import MPI

        local = MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED)
        library = MPI.Get_library_version().split()
        name = "Open MPI" if library[:2] == ["Open", "MPI"] else library[0]
        by_mpi = (name, MPI.COMM_WORLD.allreduce(10 ** hvd.rank()), local.rank, local.size)
    lines = subprocess.run(["ss", "-Hantup"], capture_output=True, text=True, check=True).stdout.splitlines()
    sockets = [line.split() for line in lines if '"java"' not in line]
    hvd.allreduce(tf.zeros(1), name="everybody has looked")
    return {
        "host": socket.gethostname(),
        "own name": socket.gethostbyname(socket.gethostname()),
        "rank": (hvd.rank(), hvd.size()),
        "local": (hvd.local_rank(), hvd.local_size()),
        "cross": (hvd.cross_rank(), hvd.cross_size()),
        "total": total.numpy().tolist(),
        "by_mpi": by_mpi,
        # Netid, state, two queues, this end, the other end, and perhaps whose it is.
        "listening": {row[4].rpartition(":")[0] for row in sockets if row[1] in ("LISTEN", "UNCONN")},
        # What is no rank's, nor the daemon's of Spark's Python workers: where ranks meet.
        "servers": [row[4] for row in sockets if row[1] == "LISTEN" and is_server(row)],
        "connected": {(row[4].rpartition(":")[0], row[5].rpartition(":")[0]) for row in sockets if row[1] == "ESTAB"},
    }


def is_server(row: Sequence[str]) -> bool:
    return "hvdspark-rank" not in row[-1] and not row[4].startswith("127.0.0.1:")


@pytest.fixture
def mpi(request: pytest.FixtureRequest, spark: SparkSession) -> Iterator[str]:
    """The MPI that the executors' Horovod was compiled for."""
    with contextlib.ExitStack() as stack:
        if request.param == "Open MPI":
            python, path = (request.getfixturevalue(name) for name in ("openmpi_python", "as_imported"))
            stack.enter_context(executors_on(spark, python, path))
        yield request.param


@pytest.mark.parametrize(
    ("controller", "nic", "mpi"),
    [("gloo", "eth0", "MPICH"), ("mpi", "eth1", "MPICH"), ("mpi", "eth1", "Open MPI")],
    indirect=["mpi"],
)
def test_ranks_know_who_is_on_their_host_and_keep_to_its_interface(
    spark: SparkSession, site: Site, controller: str, nic: str, mpi: str
) -> None:
    nics = [] if nic == "eth0" else [nic]
    found = hvdspark.run(place, num_proc=SIZE, controller=controller, nics=nics, preload=KERAS_RANK)

    # Spark knows alpha by two names, and beta's own leads to its loopback.
    assert {rank["host"]: rank["own name"] for rank in found} == {"alpha": NAMES["alpha"], "beta": "127.0.1.1"}
    hosts = list(dict.fromkeys(rank["host"] for rank in found))
    expected = [(host, (local, SLOTS[host])) for host in hosts for local in range(SLOTS[host])]
    assert [(rank["host"], rank["local"]) for rank in found] == expected
    assert [rank["rank"] for rank in found] == [(number, SIZE) for number in range(SIZE)]
    for rank in found:
        alike = [host for host in hosts if SLOTS[host] > rank["local"][0]]
        assert rank["cross"] == (alike.index(rank["host"]), len(alike))
        assert rank["total"] == [0.0, 15.0, 30.0]
        assert rank["by_mpi"] == ((mpi, 11111, *rank["local"]) if controller == "mpi" else None)

    listening = set()
    for rank in found:
        own = site.net.hosts[rank["host"]].addresses[nic]
        # On the loopback listens the daemon of Spark's Python workers.
        assert rank["listening"] <= {own, "127.0.0.1"}
        listening |= rank["listening"] & {own}
        beyond = {ends for ends in rank["connected"] if not {*ends} <= {own, "127.0.0.1"}}
        assert beyond
        assert all(here == own and there.startswith(f"{NETWORKS[nic]}.") for here, there in beyond)
    # What ranks meet at is on the first one's host; MPI's own sockets are there as long as the job.
    assert len(listening) == (2 if controller == "mpi" else 1)


def test_mpi_is_taken_by_itself_where_all_hosts_have_rdma_and_then_nothing_waits_for_gloo(
    spark: SparkSession, site: Site
) -> None:
    settings: dict[str, Any] = {"controller": "auto", "preload": KERAS_RANK}
    with rdma_on(site.alpha), rdma_on(site.beta):
        found = hvdspark.run(place, num_proc=SIZE, nics=["mlx5_0"], **settings)
        without = hvdspark.run(place, num_proc=SIZE, rdma=False, **settings)
        with pytest.raises(RendezvousError, match=r"rdma=True, but the ranks talk by Gloo \(as asked for\)"):
            hvdspark.run(os.getpid, num_proc=SIZE, rdma=True)
    assert [rank["by_mpi"][:2] for rank in found] == [("MPICH", 11111)] * SIZE
    assert [rank["servers"] for rank in found] == [[]] * SIZE
    for rank in found:
        assert rank["listening"] <= {site.net.hosts[rank["host"]].addresses["eth1"], "127.0.0.1"}
    # Gloo's rendezvous is there as long as the job.
    assert [rank["by_mpi"] for rank in without] == [None] * SIZE
    assert len({server for rank in without for server in rank["servers"]}) == 1


def test_a_host_that_offers_only_its_loopback_is_an_error_before_any_rank_works(spark: SparkSession) -> None:
    message = r"host \S+ offers only the loopback address 127\.0\.0\.1 to a job over several hosts; name an interface"
    with pytest.raises(RendezvousError, match=message):
        hvdspark.run(os.getpid, num_proc=3, nics=["lo"])


LISTENER = """
import select, sys
from hvdspark.launch.alarm import Alarm

with Alarm((sys.argv[1], int(sys.argv[2])), "secret", 1) as alarm:
    print("there", flush=True)
    select.select([alarm], [], [])
    print(alarm.cause())
"""


def test_both_ends_of_a_cut_are_free_soon_whatever_was_on_its_way(site: Site) -> None:
    """Else the first rank's task, with what its rank failed of, would wait for a quarter of an hour."""
    here, far = site.cluster.driver.addresses["eth1"], site.beta
    with AlarmServer(here, [here, far.addresses["eth1"]], 2, "secret") as server:
        command = far.command(sys.executable, "-c", LISTENER, here, str(server.address[1]))
        listener = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        own = connect(server.address, "secret", 0, 5)
        with listener, own:
            assert listener.stdout is not None
            assert listener.stdout.readline() == "there\n"
            site.net.plug(far, into=False, interfaces=["eth1"])
            start = time.monotonic()
            own.sendall(b"ring\nthrough\n")
            assert listener.communicate(timeout=30)[0] == "('the connection to rank 0 was lost', True)\n"
    # The server has waited for the other's end.
    assert 5 < time.monotonic() - start < 30
    site.net.plug(far, into=True)
