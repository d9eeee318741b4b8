"""Sums in shared memory between real processes: exact, the same on all ranks, and never waiting for the dead."""

from __future__ import annotations

import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvdspark.worker.shared_region import is_supported

pytestmark = pytest.mark.skipif(not is_supported(), reason="not for this machine: needs Linux on x86-64")

TIMEOUT_S = 60

PREAMBLE = """
import os, signal, sys, time
import ml_dtypes
import numpy as np
from hvdspark.worker.shared_sum import SharedSum
address, rank, size, chunk_bytes, folder = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5]

def arrays(number, of, sizes, dtypes):
    random = np.random.default_rng([number, of])
    return [random.normal(size=size).astype(dtype) for size, dtype in zip(sizes, dtypes, strict=True)]

shared = SharedSum(address, rank, size, chunk_bytes)
"""


@contextmanager
def ranks(size: int, program: str, folder: Path, chunk_bytes: int = 1 << 20) -> Iterator[list[subprocess.Popen[str]]]:
    """Run a program as so many ranks."""
    address = f"hvdspark-test-{secrets.token_hex(8)}"
    with ExitStack() as stack:
        children = []
        for rank in range(size):
            given = (address, str(rank), str(size), str(chunk_bytes), str(folder))
            child = subprocess.Popen(
                [sys.executable, "-c", PREAMBLE + program, *given],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(child)
            stack.callback(child.kill)
            children.append(child)
        yield children


def finish(children: Sequence[subprocess.Popen[str]]) -> None:
    for child in children:
        _, log = child.communicate(timeout=TIMEOUT_S)
        assert child.returncode == 0, log


ADD = """
sizes, dtypes, factor = {sizes}, {dtypes}, {factor}
for number in range({rounds}):
    sums = shared.add(arrays(number, rank, sizes, dtypes), factor)
    exact = [
        sum(array.astype("f8") * factor for array in found)
        for found in zip(*(arrays(number, other, sizes, dtypes) for other in range(size)))
    ]
    for found, expected, size_, dtype in zip(sums, exact, sizes, dtypes, strict=True):
        assert (found.shape, found.dtype) == (expected.shape, np.dtype(dtype)), (found.shape, found.dtype)
        tolerance = {{"f8": 1e-14, "f4": 1e-6, "f2": 1e-3, "bfloat16": 1e-2}}[dtype]
        np.testing.assert_allclose(found.astype("f8"), expected, rtol=tolerance, atol=8 * tolerance)
np.savez(folder + f"/{{rank}}.npz", *[found.astype("f8") for found in sums])
shared.close()
"""


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("sizes", "dtypes", "chunk_bytes"),
    [
        pytest.param([(7,), (3, 5), (), (1,)], ["f4"] * 4, 1 << 20, id="odd sizes"),
        pytest.param([(9,), (0,), (11,), (4, 4)], ["f8", "f4", "f2", "bfloat16"], 1 << 20, id="several dtypes"),
        pytest.param([(1000,), (33,), (5, 100)], ["f4", "f8", "f4"], 256, id="many chunks"),
        pytest.param([(300_001,)], ["f4"], 4 << 20, id="each rank adds up its part"),
    ],
)
def test_every_rank_gets_the_sum_to_the_last_bit(
    tmp_path: Path, size: int, sizes: Any, dtypes: Any, chunk_bytes: int
) -> None:
    program = ADD.format(sizes=sizes, dtypes=dtypes, factor=1 / size, rounds=3)
    with ranks(size, program, tmp_path, chunk_bytes) as children:
        finish(children)
    first, *others = (np.load(tmp_path / f"{rank}.npz") for rank in range(size))
    for other in others:
        for name in first.files:
            np.testing.assert_array_equal(first[name], other[name])


UNEVEN = """
random = np.random.default_rng(rank)
for number in range(500):
    if random.random() < 0.01:
        time.sleep(random.random() / 200)
    values = np.full(number % 50 + 1, number + rank, dtype="f4" if number % 3 else "f8")
    found, = shared.add([values])
    assert (found == size * number + size * (size - 1) / 2).all(), (number, found)
shared.close()
"""


def test_ranks_that_are_now_fast_and_now_slow_never_read_a_slot_too_early_or_too_late(tmp_path: Path) -> None:
    """More ranks than most machines that run this have cores to spare, with chunks of few values."""
    with ranks(4, UNEVEN, tmp_path, chunk_bytes=128) as children:
        finish(children)


def test_what_is_no_number_is_handed_on_without_a_warning(tmp_path: Path) -> None:
    program = """
import warnings
warnings.simplefilter("error")
found, = shared.add([np.array([np.inf if rank else -np.inf, np.nan, 3e38, 1.0], "f4")])
assert np.isnan(found[:2]).all() and np.isinf(found[2]) and found[3] == size, found
shared.close()
"""
    with ranks(2, program, tmp_path) as children:
        finish(children)


def test_ranks_that_add_up_different_arrays_are_told(tmp_path: Path) -> None:
    program = "shared.add([np.zeros(16 * (rank + 1), 'f4')])"
    with ranks(2, program, tmp_path) as children:
        logs = [child.communicate(timeout=TIMEOUT_S)[1] for child in children]
    assert all("different arrays, of [64, 128] bytes" in log for log in logs), logs


ENDLESS = """
print("ready", flush=True)
while True:
    shared.add([np.ones(1000, "f4")])
"""


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_killed_rank_is_noticed_by_all_others_and_leaves_nothing_behind(tmp_path: Path, victim: int) -> None:
    before = set(Path("/dev/shm").iterdir())
    with ranks(3, ENDLESS, tmp_path) as children:
        for child in children:
            assert child.stdout is not None
            assert child.stdout.readline() == "ready\n"
        children[victim].send_signal(signal.SIGKILL)
        start = time.monotonic()
        logs = [child.communicate(timeout=TIMEOUT_S)[1] for child in children]
        seconds = time.monotonic() - start
    assert seconds < 10
    for rank in {0, 1, 2} - {victim}:
        assert children[rank].returncode == 1
        assert "PeerLostError: rank" in logs[rank]
    assert set(Path("/dev/shm").iterdir()) <= before


STOPPED = """
import hvdspark.worker.shared_region as region
region.STOPPED_TIMEOUT_S = 0.5
shared.add([np.ones(10, "f4")])
print(os.getpid(), flush=True)
if rank == 1:
    os.kill(os.getpid(), signal.SIGSTOP)
shared.add([np.ones(10, "f4")])
"""


def test_a_stopped_rank_is_not_waited_for_for_ever(tmp_path: Path) -> None:
    with ranks(2, STOPPED, tmp_path) as children:
        _, log = children[0].communicate(timeout=TIMEOUT_S)
        assert children[1].poll() is None
    assert "PeerLostError: rank 1 was stopped" in log


def test_a_rank_that_does_not_come_ends_the_waiting() -> None:
    from hvdspark.worker.shared_region import SharedRegion

    for rank in (0, 1):
        with pytest.raises(TimeoutError):
            SharedRegion(f"hvdspark-test-{secrets.token_hex(8)}", rank, 2, 64, join_timeout_s=0.05)
