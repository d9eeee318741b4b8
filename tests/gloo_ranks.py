"""Horovod ranks without Spark: programs in processes of their own, which meet over Gloo."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest

from hvdspark.launch.gloo import gloo_environment

RENDEZVOUS = """
import sys
from hvdspark.launch.gloo import RendezvousServer
with RendezvousServer("127.0.0.1", {"127.0.0.1"}, ranks=2, token="TOKEN") as server:
    print(server.address[1], flush=True)
    sys.stdin.read()
"""


@contextmanager
def process(*command: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run a program with pipes; on leaving it is killed if it still runs."""
    child = subprocess.Popen(
        command,
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"} | environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with child:
        try:
            yield child
        finally:
            child.kill()


@contextmanager
def two_gloo_ranks(
    program: str, prefix: Sequence[str] = (), **environment: str
) -> Iterator[list[subprocess.Popen[str]]]:
    """Run a program as two Horovod ranks of one host, with a rendezvous, each command after `prefix`."""
    python = (*prefix, sys.executable, "-c")
    with process(*python, RENDEZVOUS) as rendezvous:
        settings = {
            **gloo_environment(("127.0.0.1", int(first_line(rendezvous))), "TOKEN", interface="lo"),
            "HOROVOD_HOSTNAME": "host",
            "HOROVOD_SIZE": "2",
            "HOROVOD_LOCAL_SIZE": "2",
            "HOROVOD_CROSS_RANK": "0",
            "HOROVOD_CROSS_SIZE": "1",
            **environment,
        }
        ranks = [
            process(*python, program, **settings, HOROVOD_RANK=rank, HOROVOD_LOCAL_RANK=rank) for rank in ("0", "1")
        ]
        with ranks[0] as first, ranks[1] as second:
            yield [first, second]


def first_line(child: subprocess.Popen[str]) -> str:
    """Return the first line the program prints; fail with what it wrote to stderr if it ends without one."""
    assert child.stdout is not None
    assert child.stderr is not None
    return child.stdout.readline().strip() or pytest.fail(child.stderr.read())
