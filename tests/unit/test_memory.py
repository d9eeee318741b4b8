"""Whose processes the kernel killed for memory, by what Linux shows of control groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from hvdspark.launch.memory import kills_for_memory

# As they are with systemd, in a container that sees its own group as the root, and in one that is told its host's path.
EVENTS = "low 0\nhigh 0\nmax 12\noom 3\noom_kill {}\noom_group_kill 0\n"
SERVICE = "system.slice/spark-worker.service"
VMSTAT = {"proc/vmstat": "pgfault 7\noom_kill 90\nthp_fault_alloc 0\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        (
            {
                "proc/self/cgroup": f"0::/{SERVICE}\n",
                f"sys/fs/cgroup/{SERVICE}/memory.events": EVENTS.format(2),
                "sys/fs/cgroup/system.slice/memory.events": EVENTS.format(5),
            },
            2,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.events": EVENTS.format(1)}, 1),
        ({"proc/self/cgroup": "0::/kubepods/pod1/c1\n", "sys/fs/cgroup/memory.events": EVENTS.format(0)}, 0),
        # A group without a count of its own: that of the one around it.
        (
            {
                "proc/self/cgroup": f"0::/{SERVICE}/inner\n",
                f"sys/fs/cgroup/{SERVICE}/memory.events": EVENTS.format(4),
            },
            4,
        ),
        (
            {
                "proc/self/cgroup": "9:name=systemd:/x\n4:memory:/docker/c1\n0::/\n",
                "sys/fs/cgroup/memory/docker/c1/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n",
            },
            3,
        ),
        # The root of a host has no count, and neither have old kernels.
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cgroup.procs": "1\n"}, 90),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.events": "low 0\nmax 12\n"}, 90),
        ({}, 90),
    ],
)
def test_kills_are_counted_in_the_group_of_this_process(files: dict[str, str], expected: int, tmp_path: Path) -> None:
    for name, text in {**VMSTAT, **files}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert kills_for_memory(tmp_path) == expected


def test_a_system_that_counts_nothing_counts_none(tmp_path: Path) -> None:
    assert kills_for_memory(tmp_path) == 0
