"""Processes that no signal ends, as where they wait in the kernel for a file system or a device."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

# A tracer that wants to see how its process ends, and never looks: that stays with all that it holds open.
_HOLD = """
import ctypes, sys

SEIZE, TRACE_EXIT = 0x4206, 0x40
ptrace = ctypes.CDLL(None, use_errno=True).ptrace
ptrace.argtypes = [ctypes.c_long] * 4
print(0 if ptrace(SEIZE, int(sys.argv[1]), 0, TRACE_EXIT) == 0 else ctypes.get_errno(), flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def held(pid: int) -> Iterator[None]:
    """Keep a process from ending, whatever it is sent, until the end of the block."""
    command = [sys.executable, "-c", _HOLD, str(pid)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as tracer:
        try:
            assert tracer.stdout is not None
            failed = int(tracer.stdout.readline())
            assert not failed, f"process {pid} cannot be traced: error {failed}"
            yield
        finally:
            tracer.kill()
