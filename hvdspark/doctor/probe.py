"""What runs on an executor to find out what is there; it travels as source text.

An executor that is to be examined may lack hvdspark, pyarrow and anything else, or run another Python. So this file
needs the standard library alone, of any Python since 3.8. What else a check would like to have it imports itself: a
check that fails tells why, and the others go on.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Marks the line that is the answer, where others may write to the same stream.
MARK = "hvdspark-doctor:"

# Where ranks of one host average.
SHARED_MEMORY = "/dev/shm"

# What a task says to the others that leaves its executor to another task.
_NOT_FIRST = "{}"

_CONNECT_S, _PEERS_S, _TOOL_S = 5.0, 10.0, 20.0

# In a process of its own, because importing TensorFlow takes seconds, prints, and can crash.
_LOAD_HOROVOD = """
import ctypes, json, os, re
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
import horovod.tensorflow as hvd
kinds = ("gloo", "mpi", "nccl", "cuda", "rocm", "ccl")
found, library = {name: bool(getattr(hvd, name + "_built")()) for name in kinds}, None
for path in (line.split()[-1] for line in open("/proc/self/maps")):
    if re.search(r"/libmpi(ch)?[.]so", path):
        text, length = ctypes.create_string_buffer(8192), ctypes.c_int()
        ctypes.CDLL(path).MPI_Get_library_version(text, ctypes.byref(length))
        library = " ".join(text.value.decode().split()[:3])
        break
print(json.dumps([found, library]))
"""


def load_horovod(timeout_s: float = 120.0) -> tuple[dict[str, bool], str | None, str | None]:
    """Load Horovod in another process, and ask it what it was built with.

    Returns
    -------
    built : dict of str to bool
        By what it is: ``"gloo"``, ``"mpi"``, ``"nccl"``, …
    library : str or None
        The MPI library that came with it.
    error : str or None
        What went wrong.
    """
    # What travels with a job Spark adds to the path of its own process only.
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(part for part in sys.path if part)}
    command = [sys.executable, "-c", _LOAD_HOROVOD]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, env=variables, check=False)
    except subprocess.TimeoutExpired:
        return {}, None, f"importing it took more than {timeout_s:g} s"
    lines = done.stdout.strip().splitlines()
    if done.returncode == 0 and lines:
        built, library = json.loads(lines[-1])
        return built, library, None
    reason = done.stderr.strip().splitlines()
    return {}, None, reason[-1] if reason else f"exit code {done.returncode}"


def examine(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Find out what is there.

    Parameters
    ----------
    settings
        ``packages``: the distributions to look for, as groups of names of which one will do; ``horovod``: whether to
        load Horovod, and for how many seconds at most; ``store``: see `_try_store`, or ``None``.

    Returns
    -------
    dict
        By check ``{"value": …}``, or ``{"error": …}`` where it failed.
    """
    checks: dict[str, Callable[[], Any]] = {
        "python": lambda: {"version": platform.python_version(), "path": sys.executable},
        "packages": lambda: _packages(settings["packages"]),
        "mpi": _mpi_hindrance,
        "cpus": lambda: len(os.sched_getaffinity(0)),
        "gpus": _gpus,
        "rdma": _rdma,
        "memory": _free_memory,
        "disk": _free_disk,
    }
    if settings.get("horovod"):
        checks["horovod"] = lambda: _horovod(settings["horovod"])
    if settings.get("store"):
        checks["store"] = lambda: _try_store(settings["store"])
    return {name: _tried(check) for name, check in checks.items()}


def examine_in_barrier(barrier: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Be a task of a barrier stage: examine the executor, if this is its first task, and look for the others.

    Parameters
    ----------
    barrier
        Spark's ``BarrierTaskContext``.
    settings
        As for :func:`examine`, and ``driver``, the driver's host, and ``token``, which tasks know each other by.
    """
    own, places = barrier.partitionId(), [info.address for info in barrier.getTaskInfos()]
    resources = barrier.resources()
    found = {
        "partition": own,
        "place": places[own],
        "gpus": list(resources["gpu"].addresses) if "gpu" in resources else [],
    }
    is_first = places.index(places[own]) == own
    if not is_first:
        barrier.allGather(_NOT_FIRST)  # all tasks have to come
        return found
    with contextlib.ExitStack() as stack:
        listener: _Listener | None = None
        try:
            listener = stack.enter_context(_Listener(_own_address(places[own], settings["driver"]), settings["token"]))
            offer: dict[str, Any] = {"address": listener.address}
        except Exception as exc:  # noqa: BLE001 - see _tried
            offer = {"error": f"it has no address for others: {type(exc).__name__}: {exc}"}
        texts = barrier.allGather(json.dumps(offer))
        until = time.monotonic() + _PEERS_S
        told = {place: json.loads(text) for place, text in zip(places, texts, strict=True) if text != _NOT_FIRST}
        others = {place: offer for place, offer in told.items() if place != places[own]}
        open_ones = {place: offer["address"] for place, offer in others.items() if "address" in offer}
        reached = _greet_all(open_ones, settings["token"])
        facts = examine(settings)
        if listener is not None:
            listener.wait(len(others), until)
    peers = {**others, **reached}
    return {**found, **_names(), "address": offer.get("address"), "peers": peers, "facts": facts}


def tell_time(barrier: Any, _: Mapping[str, Any]) -> dict[str, Any]:
    """Be a task of a stage that only asks what the time is."""
    now = time.time()
    return {"place": barrier.getTaskInfos()[barrier.partitionId()].address, "time": [now, now]}


def main(settings: Mapping[str, Any]) -> None:
    """Examine an executor from a process that the executor started, and print the answer as a line."""
    begun = time.time()
    facts = examine(settings)
    answer = {**_names(), "facts": facts, "time": [begun, time.time()]}
    sys.stdout.write(f"\n{MARK}{json.dumps(answer)}\n")


def _tried(check: Callable[[], Any]) -> dict[str, Any]:
    try:
        return {"value": check()}
    except Exception as exc:  # noqa: BLE001 - whatever is wrong there is what is asked for
        return {"error": f"{type(exc).__name__}: {exc}"}


def _names() -> dict[str, Any]:
    """Return Spark's name of the executor and its host, which its process was started with."""
    pid = os.getpid()
    while pid > 0:
        with open(f"/proc/{pid}/cmdline") as file:  # noqa: PTH123
            words = file.read().split("\0")
        if "--executor-id" in words and "--hostname" in words:
            return {name: words[words.index(option) + 1] for name, option in _OPTIONS.items()}
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            pid = int(file.read().rpartition(")")[2].split()[1])
    return {"executor": "driver", "host": socket.gethostname()}


_OPTIONS = {"executor": "--executor-id", "host": "--hostname"}


def _packages(groups: Sequence[Sequence[str]]) -> dict[str, str | None]:
    """Return the versions that are installed, by the first name of the group; ``None`` for what is not there."""
    return {names[0]: _version(names) for names in groups}


def _version(names: Sequence[str]) -> str | None:
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    # What is on the path without having been installed, as pyspark in an executor, and what --py-files brings.
    if importlib.util.find_spec(names[0]) is None:
        return None
    try:
        return str(getattr(importlib.import_module(names[0]), "__version__", "of an unknown version"))
    except Exception as exc:  # noqa: BLE001 - see _tried
        return f"that cannot be imported ({type(exc).__name__}: {exc})"


def _horovod(timeout_s: float) -> dict[str, Any]:
    if importlib.util.find_spec("horovod") is None:
        raise ModuleNotFoundError("No module named 'horovod'")
    built, library, error = load_horovod(timeout_s)
    if error is not None:
        raise ImportError(error)
    return {"built": built, "library": library}


def _mpi_hindrance() -> str | None:
    from hvdspark.launch.control import mpi_hindrance

    return mpi_hindrance()


def _rdma() -> dict[str, Any]:
    from hvdspark.launch.fabric import has_peer_memory, rdma_ports

    ports = rdma_ports()
    return {
        "ports": [str(port) for port in ports],
        "up": sum(port.is_up for port in ports),
        "peer_memory": has_peer_memory(),
    }


def _gpus() -> list[str]:
    """List the GPUs that NVIDIA's own tool finds."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    done = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=_TOOL_S, check=False)
    return [line.strip() for line in done.stdout.splitlines() if line.startswith("GPU ")]


def _free_memory() -> int:
    """Return the bytes that processes of the executor may still take."""
    with contextlib.suppress(ImportError):
        from hvdspark.data.capacity import free_memory_bytes  # knows control groups and limits as well

        return free_memory_bytes()
    with open("/proc/meminfo") as file:  # noqa: PTH123
        return int(re.search(r"MemAvailable:\s*(\d+)", file.read())[1]) * 1024  # type: ignore[index]


def _free_disk() -> dict[str, int]:
    """Return the free bytes by folder: Spark's local folders, that of temporary files, and shared memory."""
    named = os.environ.get("SPARK_LOCAL_DIRS") or os.environ.get("LOCAL_DIRS") or ""
    folders = [*filter(None, named.split(",")), tempfile.gettempdir(), SHARED_MEMORY]
    disks = {os.stat(folder).st_dev: folder for folder in reversed(folders)}  # noqa: PTH116 - each disk once
    return {folder: shutil.disk_usage(folder).free for folder in disks.values()}


def _try_store(store: Mapping[str, Any]) -> str | None:
    """Read what the driver left in the Store, and leave something there; says what is wrong with it, if anything.

    Parameters
    ----------
    store
        ``folder``: where, as a path of this machine or relative to the Store; ``ref``: how to open a Store that is not
        a folder, or ``None``; ``token``: what the driver wrote.
    """
    name = f"executor-{_names()['executor']}"
    if store["ref"] is not None:
        from hvdspark.plan import StoreRef
        from hvdspark.store import Store

        remote = Store.from_ref(StoreRef(**store["ref"]))
        if not remote.exists(store["folder"], "driver"):
            return "absent"
        if remote.read_bytes(store["folder"], "driver").decode() != store["token"]:
            return "other"
        remote.publish_bytes(store["token"].encode(), store["folder"], name)
        return None
    try:
        with open(f"{store['folder']}/driver") as file:  # noqa: PTH123
            if file.read() != store["token"]:
                return "other"
    except FileNotFoundError:
        return "absent"
    with open(f"{store['folder']}/{name}", "w") as file:  # noqa: PTH123
        file.write(store["token"])
    return None


def _own_address(place: str, driver: str) -> str:
    """Return the address by which other executors reach this one."""
    host = place.rpartition(":")[0] or "localhost"
    with contextlib.suppress(ImportError):
        from hvdspark.launch.devices import own_address

        return own_address(host, driver)
    return socket.gethostbyname(host)


class _Listener:
    """Answers other tasks with the time; a port of the system's choice, as ranks use them."""

    def __init__(self, host: str, token: str) -> None:
        self._token = token.encode()
        self._heard: set[str] = set()
        self._changed = threading.Condition()
        self._socket = socket.create_server((host, 0))
        self.address = list(self._socket.getsockname()[:2])
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self) -> _Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def wait(self, count: int, until: float) -> None:
        """Wait until as many others have come, or for as long as they may take."""
        with self._changed:
            self._changed.wait_for(lambda: len(self._heard) >= count, max(0.0, until - time.monotonic()))

    def _serve(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                connection = self._socket.accept()[0]
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError, ValueError):
            connection.settimeout(_CONNECT_S)
            with connection.makefile("rwb") as stream:
                token, who = stream.readline(1024).split()
                if token != self._token:
                    return
                stream.write(b"%.6f\n" % time.time())
                stream.flush()
            with self._changed:
                self._heard.add(who.decode())
                self._changed.notify_all()


def _greet_all(others: Mapping[str, Sequence[Any]], token: str) -> dict[str, dict[str, Any]]:
    """Connect to other tasks, all at once; returns by place how far their clocks are ahead, or what went wrong."""
    found: dict[str, dict[str, Any]] = {}
    own = f"{os.getpid()}-{time.monotonic_ns()}"

    def greet(place: str, address: Sequence[Any]) -> None:
        found[place] = _tried(lambda: _greet(address, token, own))

    threads = [threading.Thread(target=greet, args=item, daemon=True) for item in others.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * _CONNECT_S)
    return {place: found.get(place, {"error": "TimeoutError: it did not answer"}) for place in others}


def _greet(address: Sequence[Any], token: str, own: str) -> list[float]:
    """Ask another task for its time; returns by how much its clock is ahead, and the error of that, in seconds."""
    connection = socket.create_connection((address[0], address[1]), _CONNECT_S)
    with connection, connection.makefile("rwb") as stream:
        asked = time.time()
        stream.write(f"{token} {own}\n".encode())
        stream.flush()
        said = float(stream.readline(64))
        answered = time.time()
    return [said - (asked + answered) / 2, (answered - asked) / 2]
