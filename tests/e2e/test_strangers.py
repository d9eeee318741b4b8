"""Strangers at every port that the processes of a running job listen on: garbage, and a flood of connections."""

from __future__ import annotations

import contextlib
import os
import random
import re
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import psutil
import pytest
from clusters import KERAS_RANK, own_processes, training_processes
from pyspark.sql import SparkSession

import hvdspark
from hvdspark.errors import WorkerFailedError

GARBAGE = (b"\x80\x04\x95N.", b"GET / HTTP/1.1\r\n\r\n", b"\n" * 100, random.Random(1).randbytes(1 << 16))
FLOOD = [b""] * 100


def tasks() -> list[psutil.Process]:
    """List the tasks: children of Spark's daemons, whose own ports are Spark's."""
    daemons = [process for process, command in own_processes() if "pyspark.daemon" in command]
    return [process for process in daemons if process.ppid() in {daemon.pid for daemon in daemons}]


class Strangers:
    """Come to every port of tasks and ranks as soon as it is open; a context manager.

    Parameters
    ----------
    said
        What they say, one connection each; these stay open.
    visited
        Made when they have been at a rank's port.
    """

    def __init__(self, said: Sequence[bytes], visited: Path) -> None:
        self.doors: set[int] = set()
        self._said, self._visited = said, visited
        self._held: list[socket.socket] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        for connection in self._held:
            connection.close()

    def _run(self) -> None:
        while not self._ended.wait(0.02):
            for find in (tasks, training_processes):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    for process in find():
                        if self._visit(process) and find is training_processes:
                            self._visited.touch()

    def _visit(self, process: psutil.Process) -> bool:
        """Come to the ports of a process that are new; whether there were any."""
        found = {door.laddr for door in process.net_connections("tcp") if door.status == psutil.CONN_LISTEN}
        new = [address for address in found if address.port not in self.doors]
        for address in new:
            self.doors.add(address.port)
            for said in self._said:
                with contextlib.suppress(OSError):
                    connection = socket.create_connection(address, timeout=1)
                    self._held.append(connection)
                    connection.sendall(said)
        return bool(new)


def total_after(visited: str) -> float:
    """In the rank: let the strangers come to the other rank's port before the two have met."""
    import horovod.tensorflow as hvd
    import tensorflow as tf

    if os.environ["HOROVOD_RANK"] == "0":
        deadline = time.monotonic() + 60
        while not Path(visited).exists() and time.monotonic() < deadline:
            time.sleep(0.02)
    hvd.init()
    return float(hvd.allreduce(tf.constant(hvd.rank() + 1.0), op=hvd.Sum))


def run_among(said: Sequence[bytes], folder: Path) -> list[float]:
    with Strangers(said, folder / "visited") as strangers:
        try:
            return hvdspark.run(
                total_after,
                (str(folder / "visited"),),
                num_proc=2,
                preload=KERAS_RANK,
                env={"HOROVOD_GLOO_TIMEOUT_SECONDS": "20"},
            )
        finally:
            assert (folder / "visited").exists()
            # A rank's own, and where the tasks meet, or their alarm.
            assert len(strangers.doors) >= 2


# Gloo takes whoever comes first to the port of a pair of ranks for the other rank, and only one of the two is come to.
@pytest.mark.parametrize("said", [FLOOD, [*GARBAGE, *FLOOD]], ids=["a flood", "garbage"])
def test_strangers_that_come_before_the_ranks_have_met_fail_the_job_by_name_or_not_at_all(
    spark: SparkSession, tmp_path: Path, said: list[bytes]
) -> None:
    try:
        totals = run_among(said, tmp_path)
    except WorkerFailedError as exc:
        assert re.match(r"rank [01] on \S+: the training process was killed by SIGABRT", str(exc))  # noqa: PT017
    else:
        assert totals == [3.0, 3.0]
