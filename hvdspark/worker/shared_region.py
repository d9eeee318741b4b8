"""Memory that the ranks of one host share, and the place where they meet.

Nothing of it has a name in a file system: the memory is anonymous (``memfd_create``) and goes to the peers as a file
descriptor through a socket of Linux's abstract namespace. So nothing is left in ``/dev/shm``, whatever ends a rank,
and the socket tells a rank at once that its peer is gone.

Ranks wait for each other by counters in that memory. That no rank sees a counter before the values that were written
ahead of it is what x86-64 promises of plain stores; on other processors it would take barriers that Python lacks.
"""

from __future__ import annotations

import logging
import mmap
import os
import platform
import select
import socket
import struct
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil

from hvdspark.errors import PeerLostError

logger = logging.getLogger(__name__)

# A rank's line holds how often it met, its pid, and its notes of two meetings. It is a line of the processor's cache,
# so that a rank that waits does not slow down the one that writes.
_LINE_BYTES = 64
_WORD_BYTES = 8

# How often a rank looks at a counter before it sleeps between looks. Where there is a core for every rank, for about a
# quarter of a millisecond: most peers come sooner, while the shortest sleep takes 70 µs and more. Where ranks are more
# than cores, a core is better left to the peer. A limit on CPU time, as of a container, is not looked at.
_LOOKS, _LOOKS_ON_SHARED_CORES = 400, 20
_SHORT_NAP_S = 2e-5
_LONG_NAP_S = 1e-3
_PATIENCE_S = 0.02
_CHECK_S = 0.1

# Gloo gives a peer that does not move at all as long; see HOROVOD_GLOO_TIMEOUT_SECONDS.
STOPPED_TIMEOUT_S = 30.0
# A peer may be at work on something else: rank 0 writes a checkpoint, say. Horovod warns after a minute, too. Whether
# it hangs is for its own task to see, which knows what it is at.
WARNING_S = 60.0

_HELLO = struct.Struct("=I")
_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid


def is_supported() -> bool:
    """Whether this machine has what sharing takes: Linux on x86-64."""
    return hasattr(os, "memfd_create") and platform.machine() in ("x86_64", "AMD64")


class SharedRegion:
    """Anonymous memory that all ranks of a host have mapped.

    Parameters
    ----------
    address
        Name of the meeting in Linux's abstract socket namespace: the same on all ranks, of this job alone, and hard
        to guess.
    rank, size
        This rank and how many they are.
    size_bytes
        How much memory to share.
    join_timeout_s
        Seconds within which all ranks must have come.

    Raises
    ------
    OSError
        When a rank does not come (``TimeoutError``), is another user's, or there is not so much memory.
    """

    def __init__(self, address: str, rank: int, size: int, size_bytes: int, join_timeout_s: float = 30.0) -> None:
        self.rank = rank
        self.size = size
        self._others = [other for other in range(size) if other != rank]
        self._header_bytes = -(-size * _LINE_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE
        descriptor, self._peers = _join(address, rank, size, self._header_bytes + size_bytes, join_timeout_s)
        try:
            self._memory = mmap.mmap(descriptor, self._header_bytes + size_bytes)
        finally:
            os.close(descriptor)
        self._words = memoryview(self._memory)[: self._header_bytes].cast("Q")
        self._own = self._word_of(rank)
        self._meetings = 0
        self._looks = _LOOKS if size <= len(os.sched_getaffinity(0)) else _LOOKS_ON_SHARED_CORES
        self._words[self._own + 1] = os.getpid()
        self._poll = select.poll()
        for peer in self._peers.values():
            self._poll.register(peer, select.POLLIN | select.POLLHUP)

    def array(self, start_byte: int, count: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return a view of the memory as a flat array."""
        return np.frombuffer(self._memory, dtype, count, self._header_bytes + start_byte)

    def note(self, value: int) -> None:
        """Leave a number that the peers can read after the next meeting, and until the one after it is over."""
        self._words[self._own + 2 + (self._meetings + 1) % 2] = value

    def notes(self) -> list[int]:
        """Return what each rank noted before the last meeting."""
        return [self._words[self._word_of(rank) + 2 + self._meetings % 2] for rank in range(self.size)]

    def meet(self) -> None:
        """Wait until all ranks are here; what they wrote before can then be read.

        Raises
        ------
        PeerLostError
            When a peer has ended or was stopped for long.
        """
        self._meetings += 1
        self._words[self._own] = self._meetings
        for other in self._others:
            self._await(other)

    def close(self) -> None:
        """Part from the peers; the memory goes with the last process that has it."""
        for peer in self._peers.values():
            peer.close()

    def _word_of(self, rank: int) -> int:
        return rank * _LINE_BYTES // _WORD_BYTES

    def _await(self, other: int) -> None:
        words, place, meeting = self._words, self._word_of(other), self._meetings
        for _ in range(self._looks):
            if words[place] >= meeting:
                return
            os.sched_yield()
        watch = _Watch(other, words[place + 1])
        nap_s = _SHORT_NAP_S
        while words[place] < meeting:
            # Sleeping lets other threads of this process have the interpreter, those that read rows for one.
            time.sleep(nap_s)
            waited_s = watch.waited_s
            if waited_s > _PATIENCE_S:
                nap_s = _LONG_NAP_S
            if watch.is_due(waited_s):
                # Nothing is ever sent through the sockets: what can be read from one is its end.
                gone = {descriptor for descriptor, _ in self._poll.poll(0)}
                if gone and words[place] < meeting:
                    ended = next(rank for rank, peer in self._peers.items() if peer.fileno() in gone)
                    raise PeerLostError(f"rank {ended} ended while rank {self.rank} waited for rank {other}")
                watch.check(waited_s)


class _Watch:
    """Looks now and then whether the peer that is waited for can still come."""

    def __init__(self, rank: int, pid: int) -> None:
        self._rank = rank
        self._pid = pid
        self._started = time.monotonic()
        self._next_s = _CHECK_S
        self._stopped_since_s: float | None = None
        self._warned = False

    @property
    def waited_s(self) -> float:
        return time.monotonic() - self._started

    def is_due(self, waited_s: float) -> bool:
        if waited_s < self._next_s:
            return False
        self._next_s = waited_s + _CHECK_S
        return True

    def check(self, waited_s: float) -> None:
        state = _state_of(self._pid)
        if state != psutil.STATUS_STOPPED:
            self._stopped_since_s = None
        elif self._stopped_since_s is None:
            self._stopped_since_s = waited_s
        elif waited_s - self._stopped_since_s > STOPPED_TIMEOUT_S:
            raise PeerLostError(f"rank {self._rank} was stopped (SIGSTOP) for more than {STOPPED_TIMEOUT_S:g} s")
        if waited_s > WARNING_S and not self._warned:
            self._warned = True
            logger.warning("rank %d did not come for %g s; it is %s", self._rank, WARNING_S, state)


def _state_of(pid: int) -> str:
    try:
        return str(psutil.Process(pid).status())
    except psutil.Error:
        return "gone"


def _join(
    address: str, rank: int, size: int, size_bytes: int, timeout_s: float
) -> tuple[int, dict[int, socket.socket]]:
    """Meet the others; returns the memory's descriptor and the connections: rank 0 has all, the others one, to it."""
    deadline = time.monotonic() + timeout_s
    name = f"\0{address}"
    if rank > 0:
        first = _connect(name, deadline)
        first.send(_HELLO.pack(rank))
        _, descriptors, _, _ = socket.recv_fds(first, 1, 1)
        if not descriptors:
            raise ConnectionError(f"rank 0 shares no memory at {address}")
        return descriptors[0], {0: first}
    descriptor = os.memfd_create("hvdspark")
    try:
        # Allocated now: where memory is short this fails, while touching pages later would kill the process.
        os.posix_fallocate(descriptor, 0, size_bytes)
        peers = _accept(name, size, deadline)
    except OSError:
        os.close(descriptor)
        raise
    for peer in peers.values():
        socket.send_fds(peer, [b"\0"], [descriptor])
    return descriptor, peers


def _accept(name: str, size: int, deadline: float) -> dict[int, socket.socket]:
    peers: dict[int, socket.socket] = {}
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(name)
        listener.listen(size)
        while len(peers) < size - 1:
            listener.settimeout(max(deadline - time.monotonic(), 1e-3))
            peer, _ = listener.accept()
            peer.settimeout(max(deadline - time.monotonic(), 1e-3))
            if not _is_own_users(peer):
                peer.close()
                continue
            peers[_HELLO.unpack(peer.recv(_HELLO.size))[0]] = peer
    return peers


def _connect(name: str, deadline: float) -> socket.socket:
    while True:
        first = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        first.settimeout(max(deadline - time.monotonic(), 1e-3))
        try:
            first.connect(name)
        except ConnectionRefusedError:
            first.close()
            if time.monotonic() > deadline:
                raise TimeoutError("rank 0 opened no shared memory") from None
            time.sleep(_LONG_NAP_S)  # rank 0 is not there yet
            continue
        if not _is_own_users(first):
            first.close()
            raise PermissionError("the shared memory's address belongs to another user")
        return first


def _is_own_users(peer: socket.socket) -> bool:
    _, user, _ = _CREDENTIALS.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
    return bool(user == os.geteuid())
