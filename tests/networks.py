"""Several hosts on this machine: namespaces of Linux, joined by bridges, with Spark's own cluster on them.

Each host has its network (and so its loopback and ports), its name, its ``/etc/hosts`` and its shared memory. Nothing
of it has a name outside: all is gone when the last process in it ends, however that comes about.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil
import pyspark

# The interfaces of every host, and the network of each.
NETWORKS = {"eth0": "10.213.0", "eth1": "10.213.1"}
DRIVER = "driver"
_MASTER_PORT, _UI_PORT = 7077, 8080
_CLONE_NEWNET = 0x40000000
_START_S = 120.0


def why_not() -> str | None:
    """Say what this machine lacks for hosts, if anything."""
    if os.geteuid() != 0:
        return "hosts are network namespaces, which only root can make"
    missing = [program for program in ("ip", "ss", "nsenter", "setpriv", "unshare") if shutil.which(program) is None]
    if missing:
        return f"hosts need {', '.join(missing)} (iproute2, util-linux)"
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "--ipc", "true"], capture_output=True, text=True)
    return f"this machine makes no namespaces: {tried.stderr.strip()}" if tried.returncode else None


class Namespaces:
    """Namespaces that a process of ours keeps; it ends with this one."""

    def __init__(self, *kinds: str) -> None:
        self._kinds = [f"--{kind}" for kind in kinds]
        self._holder = subprocess.Popen(
            ["unshare", *self._kinds, "sh", "-c", "echo there; exec cat"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == b"there\n"
        self.pid = self._holder.pid
        self._network = network_of(self.pid)

    def command(self, *arguments: str) -> list[str]:
        return ["nsenter", "--target", str(self.pid), *self._kinds, "--", *arguments]

    def do(self, script: str) -> str:
        """Run a script inside to its end, and return what it prints."""
        done = subprocess.run(self.command("sh", "-ec", script), capture_output=True, text=True, timeout=30)
        assert done.returncode == 0, f"{script}: {done.stderr}"
        return done.stdout

    def processes(self) -> list[psutil.Process]:
        """List what runs inside, apart from what keeps it."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(OSError, psutil.NoSuchProcess):
                if network_of(process.pid) == self._network and process.pid != self.pid:
                    found.append(process)
        return found

    def kill(self) -> None:
        """Kill all that runs inside."""
        while found := self.processes():
            for process in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(found, timeout=10)

    def close(self) -> None:
        self.kill()
        assert self._holder.stdin is not None
        self._holder.stdin.close()
        self._holder.wait(10)
        assert self._holder.stdout is not None
        self._holder.stdout.close()


def network_of(pid: int) -> int:
    """Return the number of a process's network."""
    return Path(f"/proc/{pid}/ns/net").stat().st_ino


class Host(Namespaces):
    """A host of a :class:`Net`.

    Parameters
    ----------
    name
        Its own name.
    number
        The last part of its addresses.
    names
        The lines of its ``/etc/hosts``.
    folder
        Where its files lie.
    """

    def __init__(self, name: str, number: int, names: Mapping[str, str], folder: Path) -> None:
        super().__init__("net", "uts", "mount", "ipc")
        self.name = name
        self.addresses = {interface: f"{network}.{number}" for interface, network in NETWORKS.items()}
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True)
        hosts = folder / "hosts"
        hosts.write_text(
            "".join(f"{address} {host}\n" for host, address in {"localhost": "127.0.0.1", **names}.items())
        )
        self.do(
            f"hostname {name}; ip link set lo up; mount --bind {hosts} /etc/hosts;"
            " mount -t sysfs none /sys; mount -t tmpfs none /dev/shm"
        )

    @property
    def address(self) -> str:
        return self.addresses["eth0"]


class Net:
    """Hosts that are joined by a bridge for each of `NETWORKS`; a context manager."""

    def __init__(self) -> None:
        self.hosts: dict[str, Host] = {}

    def __enter__(self) -> Self:
        self._switch = Namespaces("net")
        self._switch.do("".join(f"ip link add {name} type bridge; ip link set {name} up;" for name in NETWORKS))
        return self

    def __exit__(self, *_: object) -> None:
        for host in self.hosts.values():
            host.close()
        self._switch.close()

    def add(self, host: Host) -> Host:
        """Plug a host in."""
        self.hosts[host.name] = host
        for interface, address in host.addresses.items():
            host.do(
                f"ip link add {interface} type veth peer name {host.name}-{interface} netns {self._switch.pid};"
                f" ip address add {address}/24 dev {interface}; ip link set {interface} up"
            )
            self._switch.do(f"ip link set {host.name}-{interface} master {interface} up")
        return host

    def plug(self, host: Host, *, into: bool, interfaces: Sequence[str] = tuple(NETWORKS)) -> None:
        """Plug a host's cables in or pull them out."""
        state = "up" if into else "down"
        self._switch.do("".join(f"ip link set {host.name}-{name} {state};" for name in interfaces))


@contextlib.contextmanager
def inside(host: Host) -> Iterator[None]:
    """Have this thread, and all that it starts, use the network of a host."""
    libc = ctypes.CDLL(None, use_errno=True)

    def enter(descriptor: int) -> None:
        if libc.setns(descriptor, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")

    with Path("/proc/thread-self/ns/net").open() as before, Path(f"/proc/{host.pid}/ns/net").open() as there:
        enter(there.fileno())
        try:
            yield
        finally:
            enter(before.fileno())


class Cluster:
    """Spark's standalone cluster: its master on the driver's host, workers on others.

    Parameters
    ----------
    driver
        The driver's host, whose network this thread uses.
    names
        How Java finds hosts, whatever they themselves think their address is.
    folder
        Where logs and working folders go.
    """

    def __init__(self, driver: Host, names: Mapping[str, str], folder: Path) -> None:
        self.driver = driver
        self.url = f"spark://{driver.address}:{_MASTER_PORT}"
        self.java_hosts = folder / "java-hosts"
        own = {"localhost": "127.0.0.1", socket.gethostname(): driver.address, DRIVER: driver.address}
        self.java_hosts.write_text("".join(f"{address} {name}\n" for name, address in {**own, **names}.items()))
        self._folder = folder
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        options = ("--host", self.driver.address, "--port", str(_MASTER_PORT), "--webui-port", str(_UI_PORT))
        self._start(self.driver, "master", "org.apache.spark.deploy.master.Master", *options)
        wait_for(lambda: self._state() is not None, "the master")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._started:
            process.kill()
            process.wait(10)

    def start_worker(self, host: Host, name: str, cores: int) -> None:
        """Start a worker that calls itself so."""
        options = ("--host", name, "--cores", str(cores), "--memory", "4g")
        work = self._folder / f"work-{name}"
        self._start(
            host, f"worker-{name}", "org.apache.spark.deploy.worker.Worker", *options, "-d", str(work), self.url
        )

    def wait_for_cores(self, cores: int) -> None:
        def found() -> bool:
            state = self._state() or {}
            return sum(worker["cores"] for worker in state.get("workers", ()) if worker["state"] == "ALIVE") == cores

        wait_for(found, f"workers with {cores} cores")

    def _start(self, host: Host, name: str, *arguments: str) -> None:
        environment = {name: value for name, value in os.environ.items() if name != "SPARK_LOCAL_IP"}
        environment |= {
            "PYSPARK_PYTHON": sys.executable,
            "TMPDIR": str(host.temporary),
            "SPARK_LOCAL_DIRS": str(host.temporary),
            "JDK_JAVA_OPTIONS": f"{os.environ.get('JDK_JAVA_OPTIONS', '')} -Djdk.net.hosts.file={self.java_hosts}",
            "SPARK_DAEMON_MEMORY": "256m",
        }
        # It ends with this process, however that ends.
        spark_class = str(Path(pyspark.__file__).parent / "bin" / "spark-class")
        command = ["setpriv", "--pdeathsig", "KILL", *host.command(spark_class, *arguments)]
        with (self._folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        self._started.append(process)

    def _state(self) -> dict[str, Any] | None:
        assert all(process.poll() is None for process in self._started), f"ended: see the logs in {self._folder}"
        try:
            with urllib.request.urlopen(f"http://{self.driver.address}:{_UI_PORT}/json/", timeout=5) as answer:
                state: dict[str, Any] = json.load(answer)
                return state
        except OSError:
            return None


# Three tasks are dealt to the three executors; the first host alone can run them all.
SLOTS = {"alpha": 3, "beta": 2}
NAMES = {"alpha": "10.213.0.2", "beta": "10.213.0.3"}


@dataclass(frozen=True)
class Site:
    """What tests can do things to."""

    net: Net
    alpha: Host
    beta: Host
    cluster: Cluster

    def start_workers(self, host: Host) -> None:
        """Give a host its slots."""
        if host is self.alpha:
            self.cluster.start_worker(host, "alpha", cores=1)
            self.cluster.start_worker(host, host.address, cores=2)
        else:
            self.cluster.start_worker(host, "beta", cores=2)


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = _START_S) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not there after {timeout_s:g} s"
        time.sleep(0.1)
