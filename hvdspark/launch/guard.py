"""Stands between a barrier task and its training process, so that neither leaves anything behind.

It starts the process, and when that ends or the task dies it kills every descendant, also those that left the process
group or whose parents are gone (they become this process's children, because it is their subreaper). For a process of
its own it is run as a script on a bare interpreter, so that it costs milliseconds, and it runs no native code in which
it could get stuck; a fork of a warm parent calls :func:`stand_guard`.

Usage: ``python -I -S guard.py LIFELINE COMMAND …``, where ``LIFELINE`` is a socket whose other end the task has. By it
the guard tells how the process ended, and is asked to have the process show what it is doing, and to remove a folder
that a task which dies cannot remove itself.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

# What the task says through the lifeline, each with an end: which folder is the process's, and that it wants to see the
# stacks of its threads; the signal at which the process writes these, and the variable that names the file.
FOLDER, SHOW_STACKS, END = b"F", b"S", b"\0"
STACKS_SIGNAL = signal.SIGQUIT
STACKS = "HVDSPARK_STACKS"

_REPORT = struct.Struct("=iQ")
REPORT_BYTES = _REPORT.size
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


# No dataclass: on a bare interpreter their import takes longer than all else here.
class Ending(NamedTuple):
    """How a process ended.

    Parameters
    ----------
    status
        Its wait status.
    peak_bytes
        The most memory that it had resident, or one of its own children had.
    """

    status: int
    peak_bytes: int = 0

    def to_bytes(self) -> bytes:
        """Return what goes through the lifeline."""
        return _REPORT.pack(self.status, self.peak_bytes)

    @classmethod
    def from_bytes(cls, said: bytes) -> Ending:
        """Read what a guard said; one that is gone without a word was killed, and the process with it."""
        return cls(*_REPORT.unpack(said)) if len(said) == REPORT_BYTES else cls(signal.SIGKILL)


def main() -> NoReturn:
    """Run the command until it ends or the lifeline does."""
    lifeline, command = int(sys.argv[1]), sys.argv[2:]
    try:
        stand_guard(lambda: os.execv(command[0], command), lifeline)
    finally:
        os._exit(0)


def stand_guard(work: Callable[[], object], lifeline: int, handed_over: tuple[int, ...] = ()) -> None:
    """Do the work in a child until it ends or the lifeline does; nothing that it started is left then.

    Then the task is told how the child ended. Where that is gone, the child's folder is removed.

    Parameters
    ----------
    work
        What the child does. It ends the child itself; one that returns or raises ends with code 127.
    lifeline
        A descriptor whose other end the task holds open.
    handed_over
        Descriptors that belong to the child from now on.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    # A child's end writes to this pipe, so that one poll() waits for both.
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    guard = os.getpid()
    child = os.fork()
    if child == 0:
        _work(work, guard, (lifeline, woken, wake))
    for descriptor in handed_over:
        os.close(descriptor)
    poll = select.poll()
    poll.register(lifeline, select.POLLIN | select.POLLHUP)
    poll.register(woken, select.POLLIN)
    ending, folder, rest = None, b"", b""
    while ending is None:
        ready = [descriptor for descriptor, _ in poll.poll()]
        if woken in ready:
            os.read(woken, 4096)
            ending = _reap(child)
        if lifeline in ready:
            said = _heard(lifeline)
            if not said:
                break
            *messages, rest = (rest + said).split(END)
            folder = next((message[1:] for message in messages if message.startswith(FOLDER)), folder)
            if ending is None and SHOW_STACKS in messages:
                _interrupt(child, STACKS_SIGNAL)
                # One that was stopped heeds no signal before it goes on.
                os.kill(child, signal.SIGCONT)
    ending = _kill_all(child, ending)
    try:
        os.write(lifeline, ending.to_bytes())
    except OSError:
        if folder:
            _remove(os.fsdecode(folder))


def _remove(folder: str) -> None:
    import shutil  # not before, for it takes long to import

    shutil.rmtree(folder, ignore_errors=True)


def _work(work: Callable[[], object], guard: int, not_its_own: tuple[int, ...]) -> NoReturn:
    """In the child: do the work as a process that knows nothing of its guard."""
    # Should the guard be killed itself, the process must not outlive it.
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        if os.getppid() == guard:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for descriptor in not_its_own:
                os.close(descriptor)
            work()
    finally:
        os._exit(127)


def _heard(lifeline: int) -> bytes:
    """Return what the task says; nothing when it no longer holds its end."""
    try:
        return os.read(lifeline, 4096)
    except OSError:
        return b""


def _interrupt(pid: int, number: int) -> None:
    """Send a signal to the main thread of a process.

    Sent to the process, any thread may take it; where all of them were stopped, the main one has often gone on by then,
    and its stack no longer shows where it was.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "tgkill"):
        libc.tgkill(pid, pid, number)
    else:
        os.kill(pid, number)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


def _reap(child: int) -> Ending | None:
    """Collect all that ended; returns the child's ending when it is among them."""
    found = None
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == child:
            found = Ending(status, usage.ru_maxrss * 1024)


def _kill_all(child: int, ending: Ending | None) -> Ending:
    """Kill every descendant until there is none; returns the child's ending."""
    while True:
        for pid in descendants(os.getpid()):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            pid, status, usage = os.wait4(-1, 0)
        except ChildProcessError:
            return Ending(signal.SIGKILL) if ending is None else ending
        if pid == child:
            ending = Ending(status, usage.ru_maxrss * 1024)


def descendants(ancestor: int) -> list[int]:
    """List a process's children, theirs, and so on."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # The name, in parentheses, may hold anything; state and parent follow its last one.
            parent = int((folder / "stat").read_bytes().rpartition(b")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue
        children.setdefault(parent, []).append(int(folder.name))
    found, front = [], [ancestor]
    while front:
        front = [pid for parent in front for pid in children.get(parent, [])]
        found += front
    return found


if __name__ == "__main__":
    main()
