"""What a process may still take: of the machine, of its control groups, of its own limits."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from hvdspark.data.capacity import free_disk_bytes, free_memory_bytes, scratch_folder

GB = 1 << 30


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """Make a machine with 8 GB available and no control groups."""
    meminfo = f"MemTotal: {16 * GB // 1024} kB\nMemFree: 1024 kB\nMemAvailable:    {8 * GB // 1024} kB\n"
    return write(tmp_path, {"proc/meminfo": meminfo, "proc/self/status": "Name:\tpython\n"})


def test_without_groups_and_limits_all_that_is_available_is_free(machine: Path) -> None:
    assert free_memory_bytes(machine, {}) == 8 * GB


def test_the_tightest_of_nested_groups_decides_and_idle_file_pages_are_free(machine: Path) -> None:
    write(
        machine,
        {
            "proc/self/cgroup": "0::/pod/container\n",
            "sys/fs/cgroup/pod/container/memory.max": "max\n",
            "sys/fs/cgroup/pod/container/memory.current": f"{GB}\n",
            "sys/fs/cgroup/pod/memory.max": f"{4 * GB}\n",
            "sys/fs/cgroup/pod/memory.current": f"{3 * GB}\n",
            "sys/fs/cgroup/pod/memory.stat": f"anon 1\ninactive_file {GB // 2}\n",
        },
    )
    assert free_memory_bytes(machine, {}) == GB + GB // 2


def test_groups_of_the_first_version_count_too_also_under_a_path_that_is_not_mounted(machine: Path) -> None:
    write(
        machine,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GB}\n",
            "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GB}\n",
            "sys/fs/cgroup/memory/memory.stat": f"inactive_file 0\ntotal_inactive_file {GB // 4}\n",
        },
    )
    assert free_memory_bytes(machine, {}) == GB + GB // 4


def test_a_group_that_is_over_its_limit_has_nothing_left(machine: Path) -> None:
    write(
        machine,
        {
            "proc/self/cgroup": "0::/full\n",
            "sys/fs/cgroup/full/memory.max": f"{GB}\n",
            "sys/fs/cgroup/full/memory.current": f"{2 * GB}\n",
        },
    )
    assert free_memory_bytes(machine, {}) == 0


def test_a_yarn_container_without_a_group_counts_as_full(machine: Path) -> None:
    assert free_memory_bytes(machine, {"CONTAINER_ID": "container_1_0001_01_000002"}) == 0


@pytest.mark.parametrize("limit", ["RLIMIT_DATA", "RLIMIT_AS"])
def test_a_limit_of_the_process_is_kept(limit: str) -> None:
    program = f"""
import resource
from hvdspark.data.capacity import free_memory_bytes
from pathlib import Path
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
used = int(status["VmData" if "{limit}" == "RLIMIT_DATA" else "VmSize"].split()[0]) * 1024
resource.setrlimit(resource.{limit}, (used + 10**8, used + 10**8))
print(free_memory_bytes())
"""
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert 0.9e8 < int(done.stdout) <= 1e8


def test_this_machine_has_memory_and_disk_left(tmp_path: Path) -> None:
    assert 1 << 20 < free_memory_bytes() < 1 << 50
    assert 1 << 20 < free_disk_bytes(tmp_path) < 1 << 60


def test_rows_go_to_the_folders_that_spark_names(tmp_path: Path) -> None:
    named = [tmp_path / "a", tmp_path / "b"]
    for folder in named:
        folder.mkdir()
    listed = ",".join(map(str, [tmp_path / "gone", *named]))
    assert scratch_folder({"SPARK_LOCAL_DIRS": listed, "LOCAL_DIRS": "/nowhere"}) in named
    assert scratch_folder({"LOCAL_DIRS": str(named[1])}) == named[1]
    for environ in ({}, {"SPARK_LOCAL_DIRS": str(tmp_path / "gone")}):
        assert scratch_folder(environ) == Path(tempfile.gettempdir())
