"""How much memory and disk a process may still take, as the machine, its container and its limits say."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath

# Where the two versions of control groups keep their memory controller, its files and the name of what the page cache
# holds and would give back.
_CGROUPS = {
    "v2": ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "v1": ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}


def free_memory_bytes(root: Path = Path("/"), environ: Mapping[str, str] = os.environ) -> int:
    """Return the bytes of memory that this process may still take.

    That is the least of what the machine has available, what each enclosing control group leaves (the limit of a
    Kubernetes pod, say), and what the process's own limits (``ulimit -d``, ``ulimit -v``) leave. A YARN container
    without a control group counts as full: its limit is enforced by killing, and is written nowhere.

    Parameters
    ----------
    root
        Where ``/proc`` and ``/sys`` are found.
    environ
        The environment variables.

    Notes
    -----
    Source: the kernel's ``proc(5)``, ``admin-guide/cgroup-v2.rst`` and ``admin-guide/cgroup-v1/memory.rst``. Clean
    pages of files count as used there; the inactive ones are taken for free here.
    """
    available = _numbers(root / "proc/meminfo")["MemAvailable"] * 1024
    left = list(_left_by_cgroups(root))
    if not left and "CONTAINER_ID" in environ:
        return 0
    return max(0, min([available, *left, *_left_by_limits(root)]))


def scratch_folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Return the folder on a local disk that has the most room.

    Spark names its local folders in ``SPARK_LOCAL_DIRS`` for every Python process that an executor starts, YARN in
    ``LOCAL_DIRS``; without either, or where none of them can be written to, it is the system's folder for temporary
    files.
    """
    named = environ.get("SPARK_LOCAL_DIRS") or environ.get("LOCAL_DIRS") or ""
    folders = [Path(name) for name in named.split(",") if name and os.access(name, os.W_OK | os.X_OK)]
    return max(folders, key=free_disk_bytes, default=Path(tempfile.gettempdir()))


def free_disk_bytes(folder: Path) -> int:
    """Return the bytes that may still be written to the disk of a folder."""
    return shutil.disk_usage(folder).free


def _left_by_cgroups(root: Path) -> Iterator[int]:
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, limit, usage, reclaimable = _CGROUPS["v1" if controllers else "v2"]
        own = PurePosixPath(path.lstrip("/"))
        # A container may see its own group as the root, under a path that is not mounted in it.
        for group in (own, *own.parents):
            folder = root / base / group
            try:
                highest = int((folder / limit).read_text())
                used = int((folder / usage).read_text())
            except (OSError, ValueError):  # no such group, or "max"
                continue
            yield highest - used + _numbers(folder / "memory.stat").get(reclaimable, 0)


def _left_by_limits(root: Path) -> Iterator[int]:
    status = _numbers(root / "proc/self/status")
    for limit, usage in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        highest, _ = resource.getrlimit(limit)
        if highest != resource.RLIM_INFINITY:
            yield highest - status[usage] * 1024


def _numbers(path: Path) -> dict[str, int]:
    """Read a file of names and numbers, ``name: number unit`` or ``name number``."""
    found = {}
    for line in _lines(path):
        name, _, rest = line.replace(":", " ", 1).partition(" ")
        number = rest.split()
        if number and number[0].isdigit():
            found[name] = int(number[0])
    return found


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
