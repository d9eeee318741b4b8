"""Whether the system ended a process because memory ran out, which its exit alone does not tell."""

from __future__ import annotations

import re
from pathlib import Path

_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


def kills_for_memory(root: Path = Path("/")) -> int:
    """Count the processes that the kernel has killed because memory ran out, in its control groups included.

    Parameters
    ----------
    root
        Where ``proc`` is.

    Returns
    -------
    int
        0 where the kernel does not count them (before Linux 4.13).
    """
    try:
        found = _COUNT.search((root / "proc/vmstat").read_text())
    except OSError:
        return 0
    return int(found[1]) if found else 0


def show_bytes(size_bytes: float) -> str:
    """Return a size as a person reads it, such as ``"1.5 GiB"``."""
    for unit in ("bytes", "KiB", "MiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} GiB"
