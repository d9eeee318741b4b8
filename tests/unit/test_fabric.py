"""What NCCL and UCX are told, by what Linux shows of the network hardware."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from hvdspark.errors import RendezvousError
from hvdspark.launch.devices import own_address
from hvdspark.launch.fabric import (
    Rdma,
    RdmaPort,
    check_use,
    describe,
    fabric_environment,
    has_peer_memory,
    rdma_ports,
    settings_in,
)

# As `ls` and `cat` show them on hosts with these devices: path below /sys to content.
ROCE = {
    "class/infiniband/mlx5_0/ports/1/state": "4: ACTIVE\n",
    "class/infiniband/mlx5_0/ports/1/link_layer": "Ethernet\n",
    "class/infiniband/mlx5_0/ports/1/gid_attrs/ndevs/0": "ens1f0np0\n",
    "class/infiniband/mlx5_0/ports/1/gid_attrs/ndevs/1": "ens1f0np0\n",
    "class/infiniband/mlx5_0/device/net/ens1f0np0/operstate": "up\n",
    "class/infiniband/mlx5_1/ports/1/state": "1: DOWN\n",
    "class/infiniband/mlx5_1/ports/1/link_layer": "Ethernet\n",
    "class/infiniband/mlx5_1/device/net/ens1f1np1/operstate": "down\n",
}
INFINIBAND = {
    f"class/infiniband/mlx5_{number}/{path}": text
    for number in (0, 3)
    for path, text in {
        "ports/1/state": "4: ACTIVE\n",
        "ports/1/link_layer": "InfiniBand\n",
        f"device/net/ib{number}/operstate": "up\n",
    }.items()
}
TWO_PORTS = {
    "class/infiniband/mlx4_0/ports/1/state": "4: ACTIVE\n",
    "class/infiniband/mlx4_0/ports/1/link_layer": "InfiniBand\n",
    "class/infiniband/mlx4_0/ports/2/state": "4: ACTIVE\n",
    "class/infiniband/mlx4_0/ports/2/link_layer": "Ethernet\n",
    "class/infiniband/mlx4_0/ports/2/gid_attrs/ndevs/0": "eth7\n",
    "module/nvidia_peermem/refcnt": "0\n",
}
NONE = {"class/net/eth0/operstate": "up\n"}


@pytest.fixture
def sysfs(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    for name, text in request.param.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("sysfs", "expected"),
    [
        (
            ROCE,
            [
                RdmaPort("mlx5_0", 1, "Ethernet", "ACTIVE", ("ens1f0np0",)),
                RdmaPort("mlx5_1", 1, "Ethernet", "DOWN", ("ens1f1np1",)),
            ],
        ),
        (
            INFINIBAND,
            [
                RdmaPort("mlx5_0", 1, "InfiniBand", "ACTIVE", ("ib0",)),
                RdmaPort("mlx5_3", 1, "InfiniBand", "ACTIVE", ("ib3",)),
            ],
        ),
        (
            TWO_PORTS,
            [
                RdmaPort("mlx4_0", 1, "InfiniBand", "ACTIVE", ()),
                RdmaPort("mlx4_0", 2, "Ethernet", "ACTIVE", ("eth7",)),
            ],
        ),
        (NONE, []),
    ],
    indirect=["sysfs"],
)
def test_the_ports_of_a_host_are_found(sysfs: Path, expected: list[RdmaPort]) -> None:
    assert rdma_ports(sysfs) == expected
    assert has_peer_memory(sysfs) == (sysfs / "module").exists()


@pytest.mark.parametrize("sysfs", [ROCE, INFINIBAND, TWO_PORTS], indirect=True)
def test_an_rdma_device_stands_for_its_interfaces(sysfs: Path) -> None:
    ports = rdma_ports(sysfs)
    # That of the recorded host is not here; the loopback takes its place.
    here = [dataclasses.replace(port, interfaces=("gone", "lo") if port.interfaces else ()) for port in ports]
    device = ports[-1].device
    assert own_address("gpu-7", "driver", [device], here) == "127.0.0.1"
    text = rf"interfaces {device} has .*; it has: .*lo \(127\.0\.0\.1\).*, {re.escape(str(ports[-1]))}\. Name one"
    with pytest.raises(RendezvousError, match=text):
        own_address("gpu-7", "driver", [device], ports)


ACTIVE = RdmaPort("mlx5_0", 1, "Ethernet", "ACTIVE", ("ens1",))
OTHER = RdmaPort("mlx5_1", 2, "InfiniBand", "ACTIVE", ("ib0",))
DOWN = RdmaPort("mlx5_2", 1, "Ethernet", "DOWN", ("ens2",))


@pytest.mark.parametrize(
    ("ports", "rdma", "nics", "used"),
    [
        ([ACTIVE, OTHER, DOWN], "auto", (), ["mlx5_0:1", "mlx5_1:2"]),
        ([ACTIVE, OTHER], True, ("ens1",), ["mlx5_0:1"]),
        ([ACTIVE, OTHER], "auto", ("mlx5_1",), ["mlx5_1:2"]),
        ([ACTIVE], False, (), []),
        ([DOWN], "auto", (), []),
        ([ACTIVE], "auto", ("eth0",), []),
        ([], "auto", (), []),
    ],
)
def test_libraries_are_told_of_the_ports_that_are_up(
    ports: list[RdmaPort], rdma: Rdma, nics: tuple[str, ...], used: list[str]
) -> None:
    found = fabric_environment("ens1", ports, rdma, nics, has_peer_memory=True)
    assert found["NCCL_SOCKET_IFNAME"] == "=ens1"
    assert found["UCX_NET_DEVICES"] == ",".join([*used, "ens1"])
    assert found["NCCL_IB_DISABLE"] == str(int(not used))
    assert found.get("NCCL_IB_HCA") == (f"={','.join(used)}" if used else None)
    assert found.get("NCCL_NET_GDR_LEVEL") == ("PHB" if used else None)
    by_mpi = f"RDMA over {','.join(used)}" if used else "TCP over ens1"
    assert describe(found, "mpi", on_one_host=False) == by_mpi
    assert describe(found, "mpi", on_one_host=True) == "shared memory of one host"
    by_gloo = f"TCP over ens1 (NCCL: {by_mpi})" if used else by_mpi
    assert describe(found, "gloo", on_one_host=False) == describe(found, "gloo", on_one_host=True) == by_gloo


def test_gpus_are_not_read_over_the_network_where_the_kernel_cannot() -> None:
    assert fabric_environment("ens1", [ACTIVE])["NCCL_NET_GDR_LEVEL"] == "LOC"


def test_rdma_that_nobody_in_the_job_could_use_is_not_insisted_on() -> None:
    text = r"rdma=True, but the ranks talk by Gloo \(as asked for\), .* gpu-7 has no GPU.*controller='mpi'"
    with pytest.raises(RendezvousError, match=text):
        check_use(True, "gloo", "as asked for", has_gpus=False, host="gpu-7")
    check_use(True, "gloo", "as asked for", has_gpus=True)
    check_use(True, "mpi", "as asked for", has_gpus=False)
    check_use("auto", "gloo", "as asked for", has_gpus=False)


@pytest.mark.parametrize(
    ("ports", "nics", "found"),
    [
        ([], (), "no RDMA device at all"),
        ([DOWN], (), r"mlx5_2:1 \(Ethernet on ens2, DOWN\)"),
        ([ACTIVE], ("eth9",), r"among eth9; it has: mlx5_0:1 \(Ethernet on ens1, ACTIVE\)"),
    ],
)
def test_rdma_that_is_insisted_on_and_missing_is_an_error(
    ports: list[RdmaPort], nics: tuple[str, ...], found: str
) -> None:
    with pytest.raises(RendezvousError, match=f"rdma=True, but gpu-7 has no RDMA port that is up.*{found}"):
        fabric_environment("ens1", ports, True, nics, host="gpu-7")


def test_the_log_names_what_nccl_and_ucx_are_really_told() -> None:
    environment = {**fabric_environment("ens1", []), "NCCL_IB_DISABLE": "0", "HOME": "/root"}
    assert settings_in(environment) == (
        "FI_TCP_IFACE=ens1 NCCL_IB_DISABLE=0 NCCL_SOCKET_IFNAME==ens1 UCX_NET_DEVICES=ens1"
    )
