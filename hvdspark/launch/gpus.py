"""Which GPUs a rank uses: those that Spark gave its task, or the one of its local rank where Spark knows of none."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hvdspark.errors import LaunchError, RendezvousError
from hvdspark.plan import RankContext

logger = logging.getLogger(__name__)

VISIBLE = "CUDA_VISIBLE_DEVICES"
ORDER = "CUDA_DEVICE_ORDER"
AMOUNT = "spark.task.resource.gpu.amount"

# Set for a rank whose visible devices are its own; without it they may be those of all ranks of its host.
OWN = "HVDSPARK_OWN_GPUS"


def addresses_of(resources: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the addresses of the GPUs that Spark gave a task.

    Parameters
    ----------
    resources
        Spark's ``TaskContext.resources()``.
    """
    return tuple(resources["gpu"].addresses) if "gpu" in resources else ()


def gpu_environment(
    ranks: Mapping[int, RankContext], given: Sequence[Sequence[str]], own: int, env: Mapping[str, str], amount: float
) -> dict[str, str]:
    """Return what a rank and its libraries are told of GPUs.

    They read it when they look for devices, and not when they are imported: a rank can learn it as late as its place.

    Parameters
    ----------
    ranks
        All ranks, by partition.
    given
        What Spark gave their tasks, by partition, as its discovery script calls them: numbers, UUIDs, MIG instances.
    own
        This rank's partition.
    env
        The variables that the user has set; a choice among them stays.
    amount
        How many GPUs Spark was told to give a task.

    Raises
    ------
    RendezvousError
        When ranks of a host were given the same GPU without intent.
    """
    if not given[own] or VISIBLE in env:
        return {}
    shared = check_apart([ranks[partition] for partition in range(len(given))], given, amount)
    if shared and ranks[own].rank == 0:
        logger.warning(
            "Spark gave %s, as %s=%g lets it; NCCL wants a GPU for each rank, or NCCL_MULTI_RANK_GPU_ENABLE=1",
            "; ".join(shared),
            AMOUNT,
            amount,
        )
    visible = visible_environment(given[own])
    return {OWN: "1", **{name: value for name, value in visible.items() if name not in env}}


def visible_environment(given: Sequence[str]) -> dict[str, str]:
    """Return the variables by which a process sees the GPUs that Spark gave its task, and no others; none for none."""
    if not given:
        return {}
    # nvidia-smi, by which Spark's scripts find devices, counts them so; CUDA by itself begins with the fastest.
    by_number = all(address.isdigit() for address in given)
    return {VISIBLE: ",".join(given), **({ORDER: "PCI_BUS_ID"} if by_number else {})}


def check_apart(ranks: Sequence[RankContext], gpus: Sequence[Sequence[str]], amount: float) -> list[str]:
    """Check that no two ranks of a host were given the same GPU.

    Parameters
    ----------
    ranks, gpus
        All ranks, and in the same order what Spark gave their tasks.
    amount
        How many GPUs Spark was told to give a task. With less than one it gives a GPU to several by intent.

    Returns
    -------
    list of str
        Where several ranks use one by intent: which, for the log.

    Raises
    ------
    RendezvousError
        When they do without intent.
    """
    users: dict[tuple[str, str], list[int]] = {}
    for context, own in zip(ranks, gpus, strict=True):
        for address in own:
            users.setdefault((context.host, address), []).append(context.rank)
    shared = [
        f"ranks {' and '.join(map(str, sorted(sharing)))} on {host} the GPU {address}"
        for (host, address), sharing in users.items()
        if len(sharing) > 1
    ]
    if shared and amount >= 1:
        raise RendezvousError(
            f"Spark gave {'; '.join(shared)}, although {AMOUNT}={amount:g} means that none is shared: the executors of"
            " the host find the same devices. Let the discovery script of each list only its own, or start one"
            " executor per host."
        )
    return shared


def see(given: Sequence[str]) -> None:
    """Have this process see the GPUs that Spark gave its task, and no others, but for a choice that was made for it."""
    for name, value in visible_environment(given).items():
        os.environ.setdefault(name, value)


def find_libraries() -> None:
    """Load the library of CUDA that TensorFlow does not find where it is installed from PyPI, ``tensorflow[and-cuda]``.

    Without it TensorFlow does without GPUs. Must come before it is asked for devices.
    """
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        for library in Path(folder, "cusolver", "lib").glob("libcusolver.so.*"):
            try:
                ctypes.CDLL(str(library))
            except OSError as error:
                logger.info("%s cannot be loaded: %s", library, error)


def may_be_used(given: Sequence[str], env: Mapping[str, str], root: Path = Path("/")) -> bool:
    """Whether a rank may come to use a GPU.

    Parameters
    ----------
    given
        What Spark gave its task.
    env
        The user's own variables.
    root
        Where ``dev`` is.
    """
    if VISIBLE in env:
        return env[VISIBLE] not in ("", "-1")
    # Where Spark deals out none, a rank takes one of those that there are: NVIDIA's, or AMD's.
    return bool(given) or any((root / "dev").glob("nvidia[0-9]*")) or (root / "dev" / "kfd").exists()


def describe(environment: Mapping[str, str]) -> str:
    """Say in a few words which GPUs a rank with these variables uses, and who decided that."""
    visible = environment.get(VISIBLE)
    if visible is None:
        return "no GPU from Spark"
    return f"GPU {visible or 'none'} (by {'Spark' if environment.get(OWN) else VISIBLE})"


def position(count: int, context: RankContext, environment: Mapping[str, str]) -> int:
    """Return which of the devices that a rank sees is its own.

    Parameters
    ----------
    count
        How many there are; at least one.
    context, environment
        The rank's place and variables.

    Raises
    ------
    LaunchError
        When the rank would have to share one.
    """
    if environment.get(OWN):
        return 0  # the training takes one, even where Spark gives each task several
    if context.local_size > count:
        raise LaunchError(
            f"{context.local_size} ranks on {context.host} see {count} GPU{'s' if count > 1 else ''}, and each needs"
            f" one of its own. Let Spark deal them out ({AMOUNT}=1 with spark.executor.resource.gpu.amount), lower"
            " num_proc, or train on CPUs with use_gpu=False."
        )
    if VISIBLE not in environment and context.rank == 0:
        logger.warning("Spark gave no GPUs (%s is not set): each rank takes the one of its local rank", AMOUNT)
    return context.local_rank
