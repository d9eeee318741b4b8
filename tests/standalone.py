"""Spark's standalone cluster, of real processes: a master and workers, as its own scripts start them."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import pyspark

SPARK_HOME = Path(pyspark.__file__).parent
_START_S = 120.0


class Cluster:
    """A master; workers are added by :meth:`start_worker`. A context manager.

    Parameters
    ----------
    folder
        Where logs and the workers' folders go.
    host
        The master's address.
    port, ui_port
        What it listens on; by default what is free.
    """

    def __init__(self, folder: Path, *, host: str = "127.0.0.1", port: int = 0, ui_port: int = 0) -> None:
        self.folder = folder
        self._host = host
        self._port, self._ui_port = port or free_port(host), ui_port or free_port(host)
        self._started: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def url(self) -> str:
        return f"spark://{self._host}:{self._port}"

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        options = ("--host", self._host, "--port", str(self._port), "--webui-port", str(self._ui_port))
        self.start("master", "org.apache.spark.deploy.master.Master", *options)
        wait_for(lambda: self._state() is not None, "the master")
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._started):
            self.kill(name)

    def start_worker(
        self, name: str, cores: int, memory: str = "4g", *, host: str | None = None, environment: Mapping[str, str] = {}
    ) -> None:
        """Start a worker; ``environment`` is what its executors have beside the usual."""
        options = ("--host", host or self._host, "--cores", str(cores), "--memory", memory, "--webui-port", "0")
        work = self.folder / f"work-{name}"
        self.start(
            name,
            "org.apache.spark.deploy.worker.Worker",
            *options,
            "-d",
            str(work),
            self.url,
            environment=environment,
        )

    def wait_for_cores(self, cores: int) -> None:
        """Wait until the workers have so many together."""

        def found() -> bool:
            state = self._state() or {}
            return sum(worker["cores"] for worker in state.get("workers", ()) if worker["state"] == "ALIVE") == cores

        wait_for(found, f"workers with {cores} cores")

    def applications(self) -> list[str]:
        """Name the applications that run."""
        return [application["name"] for application in (self._state() or {}).get("activeapps", ())]

    def start(self, name: str, *arguments: str, environment: Mapping[str, str] = {}) -> None:
        """Start one of Spark's daemons, anew if it is there; it ends with this process, however that ends."""
        if name in self._started:
            self.kill(name)
        command = ["setpriv", "--pdeathsig", "KILL", *self.command(name, str(SPARK_HOME / "bin/spark-class"))]
        with (self.folder / f"{name}.log").open("wb") as log:
            self._started[name] = subprocess.Popen(
                [*command, *arguments],
                env={**self.environment(name), **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def kill(self, name: str) -> None:
        """Kill a daemon; a worker's executors notice it and end."""
        process = self._started.pop(name)
        process.kill()
        process.wait(10)

    def command(self, name: str, program: str) -> Sequence[str]:
        """Return how a program is started on the daemon's host."""
        return [program]

    def environment(self, name: str) -> dict[str, str]:
        """Return the variables of a daemon."""
        kept = {key: value for key, value in os.environ.items() if key != "SPARK_LOCAL_IP"}
        return kept | {"PYSPARK_PYTHON": sys.executable, "SPARK_DAEMON_MEMORY": "256m"}

    def _state(self) -> dict[str, Any] | None:
        ended = [name for name, process in self._started.items() if process.poll() is not None]
        assert not ended, f"{ended} ended: see the logs in {self.folder}"
        try:
            with urllib.request.urlopen(f"http://{self._host}:{self._ui_port}/json/", timeout=5) as answer:
                state: dict[str, Any] = json.load(answer)
                return state
        except OSError:
            return None


@contextlib.contextmanager
def two_workers(folder: Path, *, cores: int = 1, memory: str = "4g") -> Iterator[Cluster]:
    """Provide a cluster of two workers on the loopback."""
    with Cluster(folder) as cluster:
        for name in ("worker-1", "worker-2"):
            cluster.start_worker(name, cores, memory)
        cluster.wait_for_cores(2 * cores)
        yield cluster


def free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = _START_S) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not there after {timeout_s:g} s"
        time.sleep(0.1)
