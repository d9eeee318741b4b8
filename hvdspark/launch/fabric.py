"""The network hardware of a host as Linux shows it, and what NCCL and UCX are told to use of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hvdspark.errors import RendezvousError

Rdma = Literal["auto"] | bool

# In a few words how a rank meets the others and talks to them; it logs that.
NETWORK = "HVDSPARK_NETWORK"

_SYS = Path("/sys")
_UP = "ACTIVE"


@dataclass(frozen=True)
class RdmaPort:
    """A port of an RDMA device.

    Parameters
    ----------
    device, number
        Which one, as in ``mlx5_0`` and 1.
    link
        ``"InfiniBand"``, or ``"Ethernet"`` for RoCE.
    state
        ``"ACTIVE"`` when it is up.
    interfaces
        The network interfaces of the same port.
    """

    device: str
    number: int
    link: str
    state: str
    interfaces: tuple[str, ...] = ()

    @property
    def is_up(self) -> bool:
        """Whether it can be used."""
        return self.state == _UP

    def __str__(self) -> str:
        on = f" on {', '.join(self.interfaces)}" if self.interfaces else ""
        return f"{self.device}:{self.number} ({self.link}{on}, {self.state})"


def rdma_ports(root: Path = _SYS) -> list[RdmaPort]:
    """List the ports of all RDMA devices.

    Parameters
    ----------
    root
        Where ``sysfs`` is.
    """
    found = []
    for folder in (root / "class" / "infiniband").glob("*/ports/*"):
        device = folder.parent.parent
        # A number and a name, as in "4: ACTIVE".
        state = _text(folder / "state").partition(":")[2].strip() or "UNKNOWN"
        link = _text(folder / "link_layer")
        found.append(RdmaPort(device.name, int(folder.name), link, state, _interfaces(device, folder)))
    return sorted(found, key=lambda port: (port.device, port.number))


def usable(ports: Sequence[RdmaPort], rdma: Rdma = "auto", nics: Sequence[str] = ()) -> list[RdmaPort]:
    """Return the ports that are up and that the job may use; parameters as of :func:`fabric_environment`."""
    allowed = [port for port in ports if not nics or {port.device, *port.interfaces} & set(nics)]
    return [port for port in allowed if port.is_up] if rdma is not False else []


def fabric_environment(
    interface: str,
    ports: Sequence[RdmaPort],
    rdma: Rdma = "auto",
    nics: Sequence[str] = (),
    *,
    host: str = "this host",
    has_peer_memory: bool = False,
) -> dict[str, str]:
    """Return what NCCL and UCX are told.

    Parameters
    ----------
    interface
        The network interface of the job, for what goes over TCP.
    ports
        The host's RDMA ports.
    rdma
        ``"auto"`` uses those that are up; ``True`` insists on one, ``False`` uses none.
    nics
        Network interfaces or RDMA devices that the job may use; empty for all.
    host
        Its name, for errors.
    has_peer_memory
        Whether network devices can read the memory of GPUs (``nvidia_peermem``).

    Raises
    ------
    RendezvousError
        With ``rdma=True`` where there is no such port.
    """
    used = usable(ports, rdma, nics)
    if rdma is True and not used:
        there = ", ".join(map(str, ports)) or "no RDMA device at all"
        among = f" among {', '.join(nics)}" if nics else ""
        raise RendezvousError(
            f"rdma=True, but {host} has no RDMA port that is up{among}; it has: {there}. Use rdma='auto' to go on over"
            " TCP, or have the device brought up."
        )
    names = [f"{port.device}:{port.number}" for port in used]
    settings = {
        # With "=" NCCL takes exactly these, not all whose names begin so.
        "NCCL_SOCKET_IFNAME": f"={interface}",
        "NCCL_IB_DISABLE": "0" if used else "1",
        # UCX carries MPI; beside the RDMA ports it needs the interface to set connections up.
        "UCX_NET_DEVICES": ",".join([*names, interface]),
        "FI_TCP_IFACE": interface,
    }
    if used:
        settings["NCCL_IB_HCA"] = f"={','.join(names)}"
        settings["NCCL_NET_GDR_LEVEL"] = "PHB" if has_peer_memory else "LOC"
    return settings


def describe(settings: Mapping[str, str], plane: str, *, on_one_host: bool) -> str:
    """Say in a few words what the ranks talk over by a control plane, and what NCCL does where that is another."""
    ports = settings.get("NCCL_IB_HCA", "").removeprefix("=")
    if plane == "mpi" and on_one_host:
        return "shared memory of one host"
    if plane == "mpi" and ports:
        return f"RDMA over {ports}"
    # Gloo knows nothing else, not even within a host.
    tcp = f"TCP over {settings['FI_TCP_IFACE']}"
    return f"{tcp} (NCCL: RDMA over {ports})" if ports else tcp


def check_use(rdma: Rdma, plane: str, reason: str, *, has_gpus: bool, host: str = "this host") -> None:
    """Refuse a job over several hosts that insists on RDMA where nothing in it can use that.

    Parameters
    ----------
    rdma
        As for :func:`fabric_environment`.
    plane, reason
        The control plane and why it is that one.
    has_gpus
        Whether there may be GPUs, whose NCCL uses RDMA by itself.
    host
        Its name, for errors.

    Raises
    ------
    RendezvousError
        With ``rdma=True`` where the ranks talk by Gloo and have no GPU.
    """
    if rdma is True and plane == "gloo" and not has_gpus:
        raise RendezvousError(
            f"rdma=True, but the ranks talk by Gloo ({reason}), which cannot use RDMA, and {host} has no GPU, whose"
            " NCCL could. Use controller='mpi', or rdma='auto' to go on over TCP."
        )


def settings_in(environment: Mapping[str, str]) -> str:
    """List what NCCL, UCX and Open MPI are told by these variables, whoever set them."""
    names = sorted(name for name in environment if name.startswith(("NCCL_", "UCX_", "FI_", "OMPI_MCA_")))
    return " ".join(f"{name}={environment[name]}" for name in names)


def has_peer_memory(root: Path = _SYS) -> bool:
    """Whether the kernel lets network devices read the memory of NVIDIA GPUs."""
    return any((root / "module" / name).is_dir() for name in ("nvidia_peermem", "nv_peer_mem"))


def _interfaces(device: Path, port: Path) -> tuple[str, ...]:
    """Return the network interfaces of a port."""
    # A device of several ports lists the interfaces of all; which is whose stands with the port's addresses.
    names = {_text(path) for path in port.glob("gid_attrs/ndevs/*")}
    named = sorted(name for name in names if name)
    return tuple(named or sorted(path.name for path in (device / "device" / "net").glob("*")))


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:  # entries of addresses that a port does not have cannot be read
        return ""
