"""The Horovod wheel at work: real ranks in processes of their own, over MPI and over Gloo."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from gloo_ranks import first_line, process, two_gloo_ranks

TIMEOUT_S = 60

SUM_OVER_MPI = """
import json, sys, horovod.tensorflow as hvd, tensorflow as tf
hvd.init()
total = hvd.allreduce(tf.constant(float(hvd.rank() + 1)), op=hvd.Sum)
built = {"gloo": hvd.gloo_built(), "mpi": hvd.mpi_built()}
# One write: mpiexec joins the ranks' output as it comes.
sys.stdout.write(json.dumps({"rank": hvd.rank(), "total": float(total), **built}) + chr(10))
"""

# Rank 1 never submits the tensor that rank 0 waits for.
LONELY_ALLREDUCE = """
import sys, horovod.tensorflow as hvd, tensorflow as tf
hvd.init()
if hvd.rank() == 0:
    hvd.allreduce(tf.constant(1.0), name="lonely")
sys.stdin.read()
"""

# Horovod's library alone: it connects all ranks at once, and needs no TensorFlow in Python to do so.
ADDRESSES_IN_USE = """
import ctypes, importlib.util, os, psutil, sys, sysconfig
package = importlib.util.find_spec("horovod").submodule_search_locations[0]
library = ctypes.CDLL(package + "/tensorflow/mpi_lib" + sysconfig.get_config_var("EXT_SUFFIX"))
assert library.horovod_init(None, 0, None, None, 0)
rendezvous = int(os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"])
print(*sorted({
    connection.laddr.ip
    for connection in psutil.Process().net_connections("tcp")
    if connection.status == "ESTABLISHED" and connection.raddr.port != rendezvous
}), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def host_with_two_interfaces() -> Iterator[tuple[str, ...]]:
    """A network of its own, where the hostname means 127.0.0.1 and `ring0` has another address.

    Gives the command prefix that runs a program in it.
    """
    if os.geteuid() != 0 or not all(map(shutil.which, ("ip", "unshare", "nsenter"))):
        pytest.skip("needs root, iproute2 and util-linux, to make a network namespace")
    set_up = (
        "hostname localhost"
        " && ip link set lo up"
        " && ip link add ring0 type veth peer name ring1"
        " && ip address add 198.51.100.7/24 dev ring0"
        " && ip link set ring0 up && ip link set ring1 up"
        " && echo ready && read end"
    )
    with process("unshare", "--net", "--uts", "sh", "-c", set_up) as host:
        assert host.stdout is not None
        assert host.stderr is not None
        if host.stdout.readline() != "ready\n":
            pytest.skip(f"no network namespace here: {host.stderr.read()}")
        yield ("nsenter", f"--net=/proc/{host.pid}/ns/net", f"--uts=/proc/{host.pid}/ns/uts")


def test_two_ranks_sum_over_mpi_with_a_library_that_has_gloo_too() -> None:
    mpiexec = Path(sysconfig.get_path("scripts")) / "mpiexec"
    environment = {"HOROVOD_CONTROLLER": "mpi", "HOROVOD_CPU_OPERATIONS": "mpi"}
    command = [str(mpiexec), "-n", "2", sys.executable, "-c", SUM_OVER_MPI]

    with process(*command, **environment) as job:
        stdout, stderr = job.communicate(timeout=TIMEOUT_S)

    assert job.returncode == 0, stderr
    results = sorted((json.loads(line) for line in stdout.splitlines()), key=lambda result: result["rank"])
    assert results == [{"rank": rank, "total": 3.0, "gloo": True, "mpi": True} for rank in (0, 1)]


def test_a_hang_under_gloo_is_reported_by_rank_and_ended() -> None:
    limits = {"HOROVOD_STALL_CHECK_TIME_SECONDS": "1", "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": "2"}

    with two_gloo_ranks(LONELY_ALLREDUCE, **limits) as (waiting, missing):
        try:
            _, log = waiting.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pytest.fail("rank 0 still waits for rank 1, which never submits its tensor: no stall check")
        assert missing.poll() is None

    assert waiting.returncode != 0
    assert "Missing ranks:\n1: [" in log
    assert "lonely" in log.partition("Missing ranks:")[2]
    assert "is stalled for longer than 2 seconds. Will shutdown." in log


def test_gloo_keeps_to_the_chosen_interface(host_with_two_interfaces: tuple[str, ...]) -> None:
    with two_gloo_ranks(ADDRESSES_IN_USE, prefix=host_with_two_interfaces, HOROVOD_GLOO_IFACE="ring0") as ranks:
        addresses = [first_line(rank) for rank in ranks]

    assert addresses == ["198.51.100.7", "198.51.100.7"]
