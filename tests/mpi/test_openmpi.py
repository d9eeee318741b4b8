"""Open MPI as the control plane: the same jobs as over MPICH, on executors that have it in MPICH's place."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from clusters import KERAS_RANK
from faulty_fits import Fault, assert_same, df, die, estimator, outcome  # noqa: F401 - df is a fixture
from openmpi_environment import as_imported, executors_on, openmpi_python  # noqa: F401 - fixtures
from pyspark.sql import DataFrame, SparkSession
from unkillable import held

import hvdspark
from hvdspark import Store
from hvdspark.errors import WorkerFailedError
from hvdspark.launch.mpi import mpi_environment
from hvdspark.launch.openmpi import place_environment, settings_of

MASTER = "local-cluster[2,2,2048]"


@pytest.fixture(autouse=True)
def _on_open_mpi(spark: SparkSession, openmpi_python: Path, as_imported: Path) -> Iterator[None]:  # noqa: F811
    shared = set(Path("/dev/shm").iterdir())
    with executors_on(spark, openmpi_python, as_imported):
        yield
    assert set(Path("/dev/shm").iterdir()) <= shared


def test_mpi4py_works_beside_horovod_and_nothing_listens_beyond_the_loopback(spark: SparkSession) -> None:
    def work() -> dict[str, Any]:
        import psutil
        from mpi4py import MPI

        world = MPI.COMM_WORLD
        local = world.Split_type(MPI.COMM_TYPE_SHARED)
        pair = world.Split(color=world.rank // 2, key=world.rank)
        # More than an MPI library numbers without the help of the process manager's.
        many = [pair.Dup() for _ in range(300)]
        import horovod.tensorflow as hvd
        import tensorflow as tf

        hvd.init(comm=pair)
        total = hvd.allreduce(tf.constant(float(world.rank)), op=hvd.Sum)
        listening = [
            (any(part.endswith("launch/pmix.py") for part in psutil.Process(found.pid).cmdline()), found.laddr.ip)
            for found in psutil.net_connections("tcp")
            if found.status == "LISTEN" and found.pid is not None and "java" not in psutil.Process(found.pid).name()
        ]
        found = {
            "library": MPI.Get_library_version().split(" v")[0],
            "world": (world.rank, world.size),
            "local": (local.rank, local.size),
            "all": (world.allreduce(10**world.rank), many[-1].allreduce(1)),
            "horovod": (hvd.rank(), hvd.size(), hvd.mpi_enabled(), hvd.gloo_enabled()),
            "pair": float(total),
            "servers": [address for is_server, address in listening if is_server],
            "mine": [found.laddr.ip for found in psutil.Process().net_connections("tcp") if found.status == "LISTEN"],
        }
        world.Barrier()
        return found

    results = hvdspark.run(work, num_proc=4, controller="mpi", preload=KERAS_RANK)
    for rank, found in enumerate(results):
        assert found["library"] == "Open MPI"
        assert found["world"] == found["local"] == (rank, 4)
        assert found["all"] == (1111, 2)
        assert found["horovod"] == (rank % 2, 2, True, False)
        assert found["pair"] == (1.0 if rank < 2 else 5.0)
        # One for the host, whatever the number of its ranks and executors.
        assert found["servers"] == ["127.0.0.1"]
        assert set(found["mine"]) <= {"127.0.0.1"}


def test_the_rank_that_is_killed_is_named_though_its_task_keeps_the_server_of_the_others(spark: SparkSession) -> None:
    def killed() -> None:
        import horovod.tensorflow as hvd
        import tensorflow as tf

        hvd.init()
        hvd.allreduce(tf.zeros(3), name="both are there")
        if hvd.rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        hvd.allreduce(tf.zeros(3), name="waits for the dead")

    with pytest.raises(WorkerFailedError, match=r"^rank 0 on .* was killed by SIGKILL") as caught:
        hvdspark.run(killed, num_proc=2, controller="mpi", preload=KERAS_RANK)
    assert set(caught.value.failures) == {0, 1}


def test_a_fit_that_loses_a_rank_has_the_weights_of_an_undisturbed_one_over_gloo(
    df: DataFrame,  # noqa: F811
    store: Store,
    tmp_path: Path,
) -> None:
    expected = outcome(estimator(store).fit(df))
    fault = Fault(tmp_path / "mark", 0, 2, 3, die)
    found = outcome(estimator(store, fault, controller="mpi", allreduce="horovod", run_id="openmpi").fit(df))
    assert (tmp_path / "mark").exists()
    assert_same(found, expected)
    for attempt in ("", "attempt-2/"):
        log = Path(store.path(f"runs/openmpi/logs/{attempt}rank-1.log")).read_text()
        assert "controller mpi by Open MPI (as asked for), shared memory of one host" in log
        assert "OMPI_MCA_pml=ucx" in log


HOST = """
import sys
from hvdspark.launch.mpi import ProcessManager
from hvdspark.launch.openmpi import HostServer

with ProcessManager("127.0.0.1", (), [0, 0], "token") as manager:
    manager.place([0, 0], servers=True)
    manager.admit(["127.0.0.1"])
    with HostServer(manager.address, "token", 0, 2, sys.argv[1]):
        print(manager.address[1], flush=True)
        sys.stdin.read()
"""
RANK = """
from hvdspark.worker import pmi

MPI = pmi.join()
print(MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size, MPI.COMM_WORLD.allreduce(1), flush=True)
MPI.Finalize()
"""


def test_strangers_keep_no_rank_out_and_nothing_outlives_a_task_that_is_killed(
    openmpi_python: Path,  # noqa: F811
    as_imported: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    def start(program: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        env = {**os.environ, "PYTHONPATH": str(as_imported), **variables}
        command = [str(openmpi_python), "-c", program, *arguments]
        return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def rank(number: int, manager_port: int) -> subprocess.Popen[str]:
        own = {"HOROVOD_RANK": str(number), "HOROVOD_SIZE": "2", "UCX_NET_DEVICES": "lo"}
        told = {**settings_of("Open MPI"), **place_environment("Open MPI", 0)}
        return start(RANK, **told, **own, **mpi_environment(("127.0.0.1", manager_port), "token"))

    with start(HOST, str(tmp_path)) as host:
        assert host.stdout is not None
        manager_port = int(host.stdout.readline())
        started = psutil.Process(host.pid).children(recursive=True)
        (door,) = [found for one in started for found in one.net_connections("tcp") if found.status == "LISTEN"]
        assert door.laddr.ip == "127.0.0.1"
        with socket.create_connection(door.laddr) as silent, socket.create_connection(door.laddr) as rude:
            rude.sendall(os.urandom(5000))
            ranks = [rank(number, manager_port) for number in range(2)]
            said = [process.communicate(timeout=120)[0] for process in ranks]
            silent.sendall(b"late")
        assert said == ["0 2 2\n", "1 2 2\n"]
        host.kill()
    _, alive = psutil.wait_procs(started, timeout=10)
    assert alive == []
    assert not list(tmp_path.iterdir())


def test_a_server_that_cannot_be_killed_does_not_hold_up_its_task(
    openmpi_python: Path,  # noqa: F811
    as_imported: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    env = {**os.environ, "PYTHONPATH": str(as_imported)}
    command = [str(openmpi_python), "-c", HOST, str(tmp_path)]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, env=env, **pipes) as host:
        assert host.stdout is not None
        assert host.stdin is not None
        assert host.stderr is not None
        host.stdout.readline()
        [guard] = psutil.Process(host.pid).children()
        [server] = guard.children()
        with held(server.pid):
            host.stdin.close()
            host.wait(30)
            said = host.stderr.read().decode()
    assert f"the PMIx server cannot be killed; its guard, process {guard.pid}, waits for it" in said
    _, alive = psutil.wait_procs([guard, server], timeout=10)
    assert alive == []
