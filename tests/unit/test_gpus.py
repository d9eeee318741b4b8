"""Which GPU a rank uses, by what Spark gave the tasks."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from hvdspark.errors import LaunchError, RendezvousError
from hvdspark.launch.gpus import OWN, addresses_of, describe, gpu_environment, may_be_used, position
from hvdspark.launch.topology import Peer, assign_ranks

RANKS = assign_ranks([Peer(partition, host, "") for partition, host in enumerate(("a", "b", "a", "b"))])


def told(given: list[list[str]], own: int, env: dict[str, str] | None = None, amount: float = 1) -> dict[str, str]:
    return gpu_environment(RANKS, given, own, env or {}, amount)


def test_the_addresses_are_those_of_the_tasks_gpus() -> None:
    resources = {"gpu": SimpleNamespace(addresses=["1", "2"]), "fpga": SimpleNamespace(addresses=["0"])}
    assert addresses_of(resources) == ("1", "2")
    assert addresses_of({}) == ()


@pytest.mark.parametrize(
    ("own", "visible"),
    [(["2"], "2"), (["2", "3"], "2,3"), (["GPU-8932f937"], "GPU-8932f937"), (["MIG-6e1d2b1c"], "MIG-6e1d2b1c")],
)
def test_a_rank_sees_what_its_task_was_given(own: list[str], visible: str) -> None:
    found = told([own, ["0"], ["7"], ["1"]], 0)
    assert found["CUDA_VISIBLE_DEVICES"] == visible
    # Numbers are those of nvidia-smi; an identity needs no order.
    assert found.get("CUDA_DEVICE_ORDER") == ("PCI_BUS_ID" if visible[0].isdigit() else None)


def test_nothing_is_set_where_spark_gives_nothing() -> None:
    assert told([[], [], [], []], 1) == {}


@pytest.mark.parametrize("choice", ["", "3"])
def test_the_users_own_choice_stays_even_where_tasks_have_the_same_gpu(choice: str) -> None:
    assert told([["0"]] * 4, 0, {"CUDA_VISIBLE_DEVICES": choice}) == {}


def test_the_users_own_order_stays() -> None:
    assert "CUDA_DEVICE_ORDER" not in told([["0"], ["0"], ["1"], ["1"]], 0, {"CUDA_DEVICE_ORDER": "FASTEST_FIRST"})


def test_the_same_number_on_two_hosts_is_not_the_same_gpu() -> None:
    assert told([["0"], ["0"], ["1"], ["1"]], 3)["CUDA_VISIBLE_DEVICES"] == "1"


def test_ranks_of_a_host_with_the_same_gpu_are_an_error_on_all_ranks() -> None:
    # Partitions 0 and 2 are the ranks 0 and 1 of host a.
    for own in range(4):
        with pytest.raises(RendezvousError, match=r"ranks 0 and 1 on a the GPU 1, although .*amount=1 .* discovery"):
            told([["1"], ["0"], ["1"], ["1"]], own)


def test_sharing_by_intent_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = [told([["0"], ["0"], ["0"], ["1"]], own, amount=0.5) for own in range(4)]
    assert [one["CUDA_VISIBLE_DEVICES"] for one in found] == ["0", "0", "0", "1"]
    (record,) = caplog.records
    assert "ranks 0 and 1 on a the GPU 0" in record.getMessage()
    assert "NCCL wants a GPU for each rank" in record.getMessage()


def test_a_rank_takes_the_first_of_its_own_gpus_whatever_its_local_rank() -> None:
    assert position(1, RANKS[2], {OWN: "1", "CUDA_VISIBLE_DEVICES": "5"}) == 0
    assert position(2, RANKS[2], {OWN: "1", "CUDA_VISIBLE_DEVICES": "5,6"}) == 0


def test_without_spark_a_rank_takes_the_gpu_of_its_local_rank_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        assert [position(2, RANKS[partition], {}) for partition in range(4)] == [0, 0, 1, 1]
    (record,) = caplog.records
    assert "spark.task.resource.gpu.amount is not set" in record.getMessage()


@pytest.mark.parametrize("environment", [{}, {"CUDA_VISIBLE_DEVICES": "0"}])
def test_ranks_without_a_gpu_of_their_own_are_an_error(environment: dict[str, str]) -> None:
    with pytest.raises(LaunchError, match=r"2 ranks on a see 1 GPU, .* use_gpu=False"):
        position(1, RANKS[0], environment)


@pytest.mark.parametrize(
    ("given", "env", "devices", "expected"),
    [
        ([], {}, [], False),
        ([], {}, ["nvidiactl", "null"], False),
        ([], {}, ["nvidia0"], True),
        ([], {}, ["kfd"], True),
        (["0"], {}, [], True),
        ([], {"CUDA_VISIBLE_DEVICES": "0"}, [], True),
        (["0"], {"CUDA_VISIBLE_DEVICES": ""}, ["nvidia0"], False),
        (["0"], {"CUDA_VISIBLE_DEVICES": "-1"}, ["nvidia0"], False),
    ],
)
def test_a_rank_may_use_what_it_was_given_or_what_there_is(
    given: list[str], env: dict[str, str], devices: list[str], expected: bool, tmp_path: Path
) -> None:
    (tmp_path / "dev").mkdir()
    for name in devices:
        (tmp_path / "dev" / name).touch()
    assert may_be_used(given, env, tmp_path) == expected


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({}, "no GPU from Spark"),
        ({"CUDA_VISIBLE_DEVICES": ""}, "GPU none (by CUDA_VISIBLE_DEVICES)"),
        ({"CUDA_VISIBLE_DEVICES": "3"}, "GPU 3 (by CUDA_VISIBLE_DEVICES)"),
        ({"CUDA_VISIBLE_DEVICES": "3", OWN: "1"}, "GPU 3 (by Spark)"),
    ],
)
def test_the_log_says_who_decided(environment: dict[str, str], text: str) -> None:
    assert describe(environment) == text
