"""What of the executor's hardware a rank uses: network interfaces and CPU threads."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

import psutil

from hvdspark.errors import RendezvousError
from hvdspark.launch.fabric import RdmaPort


def own_address(host: str, driver_host: str, nics: Sequence[str] = (), ports: Sequence[RdmaPort] = ()) -> str:
    """Return the IPv4 address by which the other executors reach this machine.

    Parameters
    ----------
    host
        This executor's name, as Spark knows it.
    driver_host
        The driver's name; the interface that leads to it is the fallback.
    nics
        Names of the interfaces or RDMA devices allowed; the first that has an address is taken.
    ports
        The host's RDMA ports, whose interfaces stand for their devices.

    Raises
    ------
    RendezvousError
        When none of the interfaces asked for has an address (naming those that do).
    """
    addresses = _addresses()
    if nics:
        for nic in nics:
            for name in (nic, *(name for port in ports if port.device == nic for name in port.interfaces)):
                if name in addresses:
                    return addresses[name]
        there = [f"{nic} ({address})" for nic, address in addresses.items()]
        raise RendezvousError(
            f"none of the network interfaces {', '.join(nics)} has an IPv4 address on {host}; it has:"
            f" {', '.join(there)}{''.join(f', {port}' for port in ports)}. Name one with an address, also beside an"
            " RDMA device that has none."
        )
    named = _resolve(host)
    if named in addresses.values() and not named.startswith("127."):
        return named
    # The host's name leads to its loopback, as on Debian: take the interface that leads to the driver.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((driver_host, 9))
        except OSError:
            return named or "127.0.0.1"
        address: str = probe.getsockname()[0]
        return address


def machine() -> str:
    """Return what tells this machine from others: processes with the same can talk over the loopback and shared memory.

    Spark's names cannot say that: it may know a machine by its name and by its address. Containers of one machine that
    share neither the network nor ``/dev/shm`` are told apart; empty where the system does not say.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/net').st_ino}/{os.stat('/dev/shm').st_dev}"  # noqa: PTH116
    except OSError:
        return ""


def interface_of(address: str) -> str:
    """Return the name of the network interface that has an address.

    Raises
    ------
    RendezvousError
        When none has it.
    """
    for nic, own in _addresses().items():
        if own == address:
            return nic
    raise RendezvousError(f"no network interface of this machine has the address {address}")


def threads_per_rank(local_size: int) -> int:
    """Share the machine's cores among its ranks, at least one each."""
    return max(1, len(os.sched_getaffinity(0)) // local_size)


def _addresses() -> dict[str, str]:
    """Return the IPv4 address of every interface that has one."""
    return {
        nic: found.address
        for nic, entries in psutil.net_if_addrs().items()
        for found in reversed(entries)
        if found.family == socket.AF_INET
    }


def _resolve(host: str) -> str:
    try:
        return socket.gethostbyname(host)
    except OSError:
        return ""
