"""Several hosts on this machine: namespaces of Linux, joined by bridges, with Spark's own cluster on them.

Each host has its network (and so its loopback and ports), its name, its ``/etc/hosts`` and its shared memory. Nothing
of it has a name outside: all is gone when the last process in it ends, however that comes about.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psutil
from standalone import Cluster

# The interfaces of every host, and the network of each.
NETWORKS = {"eth0": "10.213.0", "eth1": "10.213.1"}
DRIVER = "driver"
_MASTER_PORT, _UI_PORT = 7077, 8080
_CLONE_NEWNET = 0x40000000


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


@contextlib.contextmanager
def rdma_on(host: Host) -> Iterator[None]:
    """Have a host show an RDMA device that is up, mlx5_0 with the interface eth1, though there is none."""
    kept, port = host.temporary / "class-net", "/sys/class/infiniband/mlx5_0/ports/1"
    host.do(
        f"mkdir {kept}; mount --bind /sys/class/net {kept}; mount -t tmpfs none /sys/class; mkdir -p /sys/class/net"
        f" {port}; mount --move {kept} /sys/class/net; rmdir {kept};"
        f" echo '4: ACTIVE' > {port}/state; echo Ethernet > {port}/link_layer;"
        f" mkdir -p {port}/gid_attrs/ndevs; echo eth1 > {port}/gid_attrs/ndevs/0"
    )
    try:
        yield
    finally:
        host.do("umount --lazy /sys/class/net /sys/class")


class HostsCluster(Cluster):
    """A standalone cluster over hosts: its master on the driver's, workers on others.

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
        super().__init__(folder, host=driver.address, port=_MASTER_PORT, ui_port=_UI_PORT)
        self.driver = driver
        self.java_hosts = folder / "java-hosts"
        own = {"localhost": "127.0.0.1", socket.gethostname(): driver.address, DRIVER: driver.address}
        self.java_hosts.write_text("".join(f"{address} {name}\n" for name, address in {**own, **names}.items()))
        self._hosts: dict[str, Host] = {}

    def start_on(self, host: Host, name: str, cores: int) -> None:
        """Start a worker that calls itself so."""
        daemon = f"worker-{name}"
        self._hosts[daemon] = host
        self.start_worker(daemon, cores, host=name)

    def command(self, name: str, program: str) -> Sequence[str]:
        return self._host_of(name).command(program)

    def environment(self, name: str) -> dict[str, str]:
        temporary = str(self._host_of(name).temporary)
        options = f"{os.environ.get('JDK_JAVA_OPTIONS', '')} -Djdk.net.hosts.file={self.java_hosts}"
        return {
            **super().environment(name),
            "TMPDIR": temporary,
            "SPARK_LOCAL_DIRS": temporary,
            "JDK_JAVA_OPTIONS": options,
        }

    def _host_of(self, name: str) -> Host:
        return self._hosts.get(name, self.driver)


# Three tasks are dealt to the three executors; the first host alone can run them all.
SLOTS = {"alpha": 3, "beta": 2}
NAMES = {"alpha": "10.213.0.2", "beta": "10.213.0.3"}


@dataclass(frozen=True)
class Site:
    """What tests can do things to."""

    net: Net
    alpha: Host
    beta: Host
    cluster: HostsCluster

    def start_workers(self, host: Host) -> None:
        """Give a host its slots."""
        if host is self.alpha:
            self.cluster.start_on(host, "alpha", cores=1)
            self.cluster.start_on(host, host.address, cores=2)
        else:
            self.cluster.start_on(host, "beta", cores=2)
