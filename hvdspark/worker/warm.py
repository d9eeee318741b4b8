"""A warm parent: it has done the imports, and forks a rank for every task that asks; see :mod:`hvdspark.launch.pool`.

Usage: ``python -m hvdspark.worker.warm LISTENER EXECUTOR FOLDER NAME MODULE …``: the listening socket and a pidfd of
the process with which to end, both inherited, and where the socket is.

Nothing but imports happens here: what TensorFlow or Horovod keep in threads and devices would not survive a fork.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NoReturn

from hvdspark.launch import guard
from hvdspark.launch.pool import BEGUN, GUARD, IDLE_TIMEOUT, Place, is_own
from hvdspark.worker.rank import preload, serve

IDLE_TIMEOUT_S = 60.0


def main() -> NoReturn:
    """Import the modules, serve until nobody needs it any more, and end."""
    listener_fd, executor, folder = map(int, sys.argv[1:4])
    place, modules = Place(folder, sys.argv[4]), sys.argv[5:]
    _name_process("pool")
    with _ends_with(executor, place):
        preload(modules)
    _Parent(socket.socket(fileno=listener_fd), executor, place).serve()
    os._exit(0)


@contextlib.contextmanager
def _ends_with(executor: int, place: Place) -> Iterator[None]:
    """End this process when the executor ends during the block, which is too busy to look."""
    done, stop = os.pipe()

    def watch() -> None:
        ready, _, _ = select.select([executor, done], [], [])
        if executor in ready:
            place.unlink()
            os._exit(0)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        os.close(stop)
        watcher.join()
        os.close(done)


class _Parent:
    """The parent, once it has done its imports.

    Parameters
    ----------
    listener
        Where tasks connect.
    executor
        A pidfd of the process with which to end.
    place
        Where the listener's socket is.
    """

    def __init__(self, listener: socket.socket, executor: int, place: Place) -> None:
        self._listener = listener
        self._executor = executor
        self._place = place
        self._idle_timeout_s = float(os.environ.get(IDLE_TIMEOUT, IDLE_TIMEOUT_S))
        self._inode = place.inode()
        self._files = _changed_at(_loaded_files())
        self._guards: dict[int, int] = {}
        self._has_served = False
        self._poll = select.poll()
        for descriptor in (listener.fileno(), executor):
            self._poll.register(descriptor, select.POLLIN)

    def serve(self) -> None:
        """Fork for every task that connects; returns when this parent is of no more use."""
        while self._guards or self._is_listed():
            ready = [found for found, _ in self._poll.poll(self._patience_ms())]
            if self._executor in ready or (not ready and self._is_alone()):
                break
            for guard_fd in self._guards.keys() & ready:
                self._collect(guard_fd)
            if self._listener.fileno() in ready:
                if _changed_at(self._files) != self._files:
                    break  # something was upgraded or edited since; who asks now starts cold
                self._answer()
        if self._is_listed():
            self._place.unlink()

    def _patience_ms(self) -> float | None:
        if self._guards:
            return None
        # A parent that was started ahead waits for data that are still being written.
        return 1000 * self._idle_timeout_s * (1 if self._has_served else 10)

    def _is_listed(self) -> bool:
        """Whether tasks still find this parent at its place."""
        return self._place.inode() == self._inode

    def _is_alone(self) -> bool:
        """Give up the place, unless somebody has just come."""
        with self._place.locked():
            if self._poll.poll(0):
                return False
            self._place.unlink()
            return True

    def _answer(self) -> None:
        """Fork for the task that has connected."""
        connection, _ = self._listener.accept()
        with connection:
            handed_over = _received(connection)
            if len(handed_over) == 3:
                self._fork(connection, (handed_over[0], handed_over[1], handed_over[2]))
            for descriptor in handed_over:
                os.close(descriptor)

    def _fork(self, connection: socket.socket, handed_over: tuple[int, int, int]) -> None:
        pid = os.fork()
        if pid == 0:
            self._attend(connection, handed_over)
        guard_fd = os.pidfd_open(pid)
        self._guards[guard_fd] = pid
        self._poll.register(guard_fd, select.POLLIN)
        self._has_served = True

    def _collect(self, guard_fd: int) -> None:
        """Take note that a guard has ended."""
        os.waitpid(self._guards.pop(guard_fd), 0)
        self._poll.unregister(guard_fd)
        os.close(guard_fd)

    def _attend(self, connection: socket.socket, handed_over: tuple[int, int, int]) -> NoReturn:
        """In the fork: be the guard of a rank for the task at the other end."""
        try:
            os.setsid()
            _name_process("guard")
            for descriptor in (self._listener.detach(), self._executor, self._place.folder, *self._guards):
                os.close(descriptor)
            connection.sendall(GUARD.pack(os.getpid()))
            guard.stand_guard(lambda: _become_rank(*handed_over), connection.fileno(), handed_over)
        finally:
            os._exit(0)


def _received(connection: socket.socket) -> list[int]:
    """Return the descriptors that the task sends; none when it has just looked in, or is another user's."""
    if not is_own(connection):
        return []
    # It sends them as soon as it connects; one that does not shall not keep the others waiting.
    connection.settimeout(1.0)
    try:
        return socket.recv_fds(connection, len(BEGUN), 3)[1]
    except OSError:
        return []
    finally:
        connection.settimeout(None)


def _become_rank(stdin: int, output: int, answers: int) -> NoReturn:
    """In the guard's child: be what a process that was started with these descriptors would be."""
    _name_process("rank")
    for descriptor, number in ((stdin, 0), (output, 1), (output, 2)):
        os.dup2(descriptor, number)
    os.close(stdin)
    os.close(output)
    if "numpy" in sys.modules:
        # Python's own generator takes a new seed in a fork, NumPy's does not.
        sys.modules["numpy"].random.seed()
    serve(answers)


def _name_process(role: str) -> None:
    """Tell ``ps`` what this process is, since forks share their parent's command line."""
    Path("/proc/self/comm").write_text(f"hvdspark-{role}")


def _loaded_files() -> list[str]:
    """List the files of the imported modules."""
    files = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    return [path for path in files if isinstance(path, str)]


def _changed_at(paths: Iterable[str]) -> dict[str, int]:
    """Return when each file was changed last, zero for those that are gone."""
    found = {}
    for path in paths:
        try:
            found[path] = os.stat(path).st_mtime_ns  # noqa: PTH116 - thousands of them, before every fork
        except OSError:
            found[path] = 0
    return found


if __name__ == "__main__":
    main()
