"""Stands between a barrier task and its training process, so that neither leaves anything behind.

It starts the process, and when that ends or the task dies it kills every descendant, also those that left the process
group or whose parents are gone (they become this process's children, because it is their subreaper). For a process of
its own it is run as a script on a bare interpreter, so that it costs milliseconds, and it runs no native code in which
it could get stuck; a fork of a warm parent calls :func:`stand_guard`.

Usage: ``python -I -S guard.py LIFELINE COMMAND …``, where ``LIFELINE`` is a descriptor that the task holds open at its
other end. It ends as the process ended: with its exit code, or by the same signal.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def main() -> NoReturn:
    """Run the command until it ends or the lifeline does."""
    lifeline, command = int(sys.argv[1]), sys.argv[2:]
    _end_like(stand_guard(lambda: os.execv(command[0], command), lifeline))


def stand_guard(work: Callable[[], object], lifeline: int, handed_over: tuple[int, ...] = ()) -> int:
    """Do the work in a child until it ends or the lifeline does; nothing that it started is left then.

    Parameters
    ----------
    work
        What the child does. It ends the child itself; one that returns or raises ends with code 127.
    lifeline
        A descriptor whose other end the task holds open.
    handed_over
        Descriptors that belong to the child from now on.

    Returns
    -------
    int
        The child's wait status.
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
    status = None
    while status is None:
        ready = [descriptor for descriptor, _ in poll.poll()]
        if woken in ready:
            os.read(woken, 4096)
            status = _reap(child)
        if lifeline in ready and not _is_held(lifeline):
            break
    return _kill_all(child, status)


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


def _is_held(lifeline: int) -> bool:
    """Whether the task still holds its end."""
    try:
        return bool(os.read(lifeline, 4096))
    except OSError:
        return False


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value)


def _reap(child: int) -> int | None:
    """Collect all that ended; returns the child's wait status when it is among them."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == child:
            found = status


def _kill_all(child: int, status: int | None) -> int:
    """Kill every descendant until there is none; returns the child's wait status."""
    while True:
        for pid in _descendants():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        try:
            pid, ended = os.waitpid(-1, 0)
        except ChildProcessError:
            return signal.SIGKILL if status is None else status
        if pid == child:
            status = ended


def _descendants() -> list[int]:
    """List this process's children, theirs, and so on."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # The name, in parentheses, may hold anything; state and parent follow its last one.
            parent = int((folder / "stat").read_bytes().rpartition(b")")[2].split()[1])
        except (OSError, IndexError, ValueError):
            continue
        children.setdefault(parent, []).append(int(folder.name))
    found, front = [], [os.getpid()]
    while front:
        front = [pid for parent in front for pid in children.get(parent, [])]
        found += front
    return found


def _end_like(status: int) -> NoReturn:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status) if not os.WIFSIGNALED(status) else 1)


if __name__ == "__main__":
    main()
