"""The check of GPUs, where there are none: it says so, and without them it does all the rest."""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path

import pytest

CHECK = Path(__file__).resolve().parents[2] / "ci" / "gpu_check.py"


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, CHECK, *arguments], capture_output=True, text=True, timeout=300)


def test_without_a_gpu_it_says_so_and_fails() -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pass
    else:
        pytest.skip("not for this machine: it has NVIDIA's driver")
    found = check()
    assert found.returncode == 1
    assert found.stdout == ""
    assert found.stderr.splitlines()[-1].startswith("gpu_check: there is no GPU here: NVIDIA's driver is not installed")


def test_its_ranks_sum_and_train_over_gloo_too() -> None:
    found = check("--cpu", "--ranks", "2", "--seconds", "0.2")
    assert found.returncode == 0, found.stderr
    (line,) = found.stdout.splitlines()
    told = json.loads(line)
    assert (told["ranks"], told["device"], told["operations"]) == (2, "CPU", "Gloo")
    assert told["nccl_built"] is False  # this environment's Horovod is the one for CPUs
    assert all(size["ms"] > 0 and size["gb_per_s"] > 0 for size in told["allreduce"].values())
    assert told["samples_per_s"] > 0
    assert told["loss"][-1] < told["loss"][0] / 1.2
