"""Horovod ranks without Spark: programs in processes of their own, which meet over Gloo."""

from __future__ import annotations

import atexit
import functools
import os
import socket
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

# Imports what takes seconds, and nothing is initialized in it: each program begins in a fork, as the warm pool's ranks
# do. Another fork tells how it ended, and ends it when nobody is left to be told.
PARENT = """
import json, os, select, signal, socket, sys
import keras, tensorflow, horovod.tensorflow, hvdspark.estimators.keras.trainer
listener = socket.socket(fileno=int(sys.argv[1]))
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
while True:
    connection, _ = listener.accept()
    _, descriptors, *_ = socket.recv_fds(connection, 1, 3)
    if os.fork():
        connection.close()
        [os.close(descriptor) for descriptor in descriptors]
        continue
    listener.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    program, environment = json.loads(connection.makefile().readline())
    rank = os.fork()
    if rank == 0:
        break
    [os.close(descriptor) for descriptor in (0, 1, 2, *descriptors)]
    ended = os.pidfd_open(rank)
    if ended not in select.select([ended, connection], [], [])[0]:
        os.kill(rank, signal.SIGKILL)
    connection.sendall(str(os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1])).encode())
    os._exit(0)
connection.close()
for number, descriptor in enumerate(descriptors):
    os.dup2(descriptor, number)
    os.close(descriptor)
os.environ.clear()
os.environ.update(environment)
exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})
"""

# Stands for a program in a fork: it has its pipes, and ends as that does.
STAND_IN = """
import json, os, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect("\\0" + sys.argv[1])
socket.send_fds(connection, [b"x"], [0, 1, 2])
connection.sendall(json.dumps([sys.argv[2], dict(os.environ)]).encode() + b"\\n")
[os.close(descriptor) for descriptor in (0, 1, 2)]
code = int(connection.recv(16) or 127)
if code < 0:
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@functools.cache
def warm_parent() -> str:
    """Start a process that has imported what ranks of Keras import; returns its name, for ``STAND_IN``."""
    name = f"hvdspark-tests-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen()
        parent = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", sys.executable, "-c", PARENT, str(listener.fileno())],
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3", "KERAS_BACKEND": "tensorflow"},
            stdin=subprocess.DEVNULL,
            pass_fds=[listener.fileno()],
        )

    def end() -> None:
        parent.kill()
        parent.wait()

    atexit.register(end)
    return name


def warm_command(program: str) -> tuple[str, ...]:
    """Return the command that runs a program in a fork of the warm parent."""
    return sys.executable, "-I", "-S", "-c", STAND_IN, warm_parent(), program


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
    program: str, prefix: Sequence[str] = (), *, warm: bool = False, **environment: str
) -> Iterator[list[subprocess.Popen[str]]]:
    """Run a program as two Horovod ranks of one host, with a rendezvous.

    Each command comes after `prefix`; ranks that are `warm` have TensorFlow from the beginning.
    """
    python = (*prefix, sys.executable, "-c")
    command = warm_command(program) if warm else (*python, program)
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
        ranks = [process(*command, **settings, HOROVOD_RANK=rank, HOROVOD_LOCAL_RANK=rank) for rank in ("0", "1")]
        with ranks[0] as first, ranks[1] as second:
            yield [first, second]


def first_line(child: subprocess.Popen[str]) -> str:
    """Return the first line the program prints; fail with what it wrote to stderr if it ends without one."""
    assert child.stdout is not None
    assert child.stderr is not None
    return child.stdout.readline().strip() or pytest.fail(child.stderr.read())
