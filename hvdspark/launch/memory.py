"""Whether the system ended a process because memory ran out, which its exit alone does not tell."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


def kills_for_memory(root: Path = Path("/")) -> int:
    """Count the processes that the kernel has killed because memory ran out.

    Those of this process's control group, for a rank is in it too; those of the whole host where that does not count.

    Parameters
    ----------
    root
        Where ``proc`` and ``sys`` are.

    Returns
    -------
    int
        0 where the kernel does not count them (before Linux 4.13).
    """
    for path in (*_counts_of_group(root), root / "proc/vmstat"):
        with contextlib.suppress(OSError):
            found = _COUNT.search(path.read_text())
            if found:
                return int(found[1])
    return 0


def _counts_of_group(root: Path) -> Iterator[Path]:
    """List where the count of this process's control group may be, the likeliest first."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mount = root / "sys/fs/cgroup"
    groups = {controllers: group for _, controllers, group in (line.split(":", 2) for line in lines)}
    if "memory" in groups:  # the first version
        mount, name, group = mount / "memory", "memory.oom_control", groups["memory"]
    else:
        name, group = "memory.events", groups.get("", "/")
    # A container may be told the path on its host, and see its own group as the root.
    inside = PurePosixPath(group.lstrip("/"))
    yield from (mount / folder / name for folder in (inside, *inside.parents))


def show_bytes(size_bytes: float) -> str:
    """Return a size as a person reads it, such as ``"1.5 GiB"``."""
    for unit in ("bytes", "KiB", "MiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} GiB"
