"""The warm pool, seen from the task: training processes that are forked from a parent which has done the imports.

An executor has one *parent* per :class:`~hvdspark.launch.process.Recipe`, and no more than a few. The first task that
wants one starts it, and it serves all tasks of that executor, fit after fit: for each it forks a guard, and the guard
forks the rank. Nothing is initialized in the parent and none of the user's code runs there, so that every rank begins
as if it had just done the imports itself. The parent's side is :mod:`hvdspark.worker.warm`.

Tasks and parent meet at a Unix socket in a folder that only this user can enter, and both check who is at the other
end. The connection is the rank's lifeline as well: when the task dies, for whatever reason, the guard sees the end of
it. The parent ends with the executor (the process that the tasks themselves are started by), and when no rank has
needed it for a while.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import socket
import stat
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hvdspark.launch.process import Recipe, TrainingProcess

logger = logging.getLogger(__name__)

BEGUN = b"B"
# What the guard answers when it has been forked: who it is.
GUARD = struct.Struct("=I")
IDLE_TIMEOUT = "HVDSPARK_POOL_IDLE_TIMEOUT_S"

# A fit that differs in its environment from the last one needs another parent; two fits may well take turns.
MAX_PARENTS = 2

_BACKLOG = 512
_CREDENTIALS = struct.Struct("3i")

# The parents that this process started; kept so that those that have ended can be collected.
_started: list[subprocess.Popen[bytes]] = []


class WarmProcess(TrainingProcess):
    """A fork of a warm parent.

    Parameters
    ----------
    connection
        A connection to the parent, see :func:`connect`.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._is_there = False
        super().__init__(connection)

    def _start(self, stdin: int, output: int, answers: int) -> None:
        # A parent that is gone shows by its missing answer.
        with contextlib.suppress(OSError):
            socket.send_fds(self._lifeline, [BEGUN], [stdin, output, answers])

    def is_there(self, timeout_s: float) -> bool:
        """Wait until the guard has been forked; ``False`` when there is no parent, or none that answers in time."""
        if not self._is_there:
            said = self._receive(GUARD.size, timeout_s) or b""
            self._is_there = len(said) == GUARD.size
            if self._is_there:
                (self._guard_pid,) = GUARD.unpack(said)
        return self._is_there

    def _let_go(self) -> None:
        if self._is_there:
            super()._let_go()


def take(recipe: Recipe) -> WarmProcess | None:
    """Ask the executor's parent for a process, starting that parent where there is none.

    Returns
    -------
    WarmProcess or None
        ``None`` when there can be no pool here, which is logged. A parent that does not answer shows only later, by
        :meth:`WarmProcess.is_there`.
    """
    try:
        with _entrance(recipe) as (place, executor):
            return WarmProcess(_reached(place) or _start(place, executor, recipe))
    except OSError as exc:
        logger.warning("no warm pool here (%s); training processes start cold", exc)
        return None


def prewarm(recipe: Recipe) -> None:
    """Start the executor's parent where there is none, and do not wait for it; never fails."""
    try:
        with _entrance(recipe) as (place, executor):
            (_reached(place) or _start(place, executor, recipe)).close()
    except OSError as exc:
        logger.debug("no warm pool here: %s", exc)


def is_own(connection: socket.socket) -> bool:
    """Whether the process at the other end belongs to this user."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid: int = _CREDENTIALS.unpack(credentials)[1]
    return uid == os.getuid()


@dataclass(frozen=True)
class Place:
    """Where a parent listens: a folder, by a descriptor that cannot be led elsewhere, and a name in it."""

    folder: int
    name: str

    @property
    def address(self) -> str:
        """The socket's address, short enough for a socket however long the folder's path is."""
        return f"/proc/self/fd/{self.folder}/{self.name}"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep others from starting, finding or giving up a parent in this folder; for moments only."""
        lock = os.open("lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600, dir_fd=self.folder)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
        finally:
            os.close(lock)

    def inode(self) -> int | None:
        """Return which socket is there, ``None`` when there is none."""
        try:
            return os.stat(self.name, dir_fd=self.folder, follow_symlinks=False).st_ino
        except FileNotFoundError:
            return None

    def connect(self) -> socket.socket | None:
        """Connect to the parent, where there is one that listens."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)  # a parent whose queue is full is as good as none
            connection.connect(self.address)
            connection.setblocking(True)
            if is_own(connection):
                return connection
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
            pass
        connection.close()
        return None

    def is_deserted(self) -> bool:
        """Whether nobody listens at the socket that is there; to be asked within :meth:`locked`, as they are made."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.setblocking(False)
            try:
                connection.connect(self.address)
            except ConnectionRefusedError:
                return True
            except OSError:
                pass
            return False

    def used_at(self) -> int:
        """Return when the parent was asked for last, in nanoseconds; zero when it is gone."""
        try:
            return os.stat(self.name, dir_fd=self.folder, follow_symlinks=False).st_mtime_ns
        except FileNotFoundError:
            return 0

    def unlink(self) -> None:
        """Remove the socket, so that nobody finds it any more."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.name, dir_fd=self.folder)

    def evict(self) -> None:
        """Make room: a parent that listens here ends as soon as it has no ranks."""
        connection = self.connect()
        self.unlink()
        if connection is not None:
            connection.close()  # this has woken it, to find that it is not listed any more


@contextlib.contextmanager
def _entrance(recipe: Recipe) -> Iterator[tuple[Place, int]]:
    """Lock the place of a recipe's parent; gives it with a pidfd of the executor, the process that starts the tasks."""
    pid = os.getppid()
    with contextlib.ExitStack() as stack:
        executor = os.pidfd_open(pid)
        stack.callback(os.close, executor)
        folder = _open_folder()
        stack.callback(os.close, folder)
        place = Place(folder, f"{pid}-{_key(recipe)}")
        stack.enter_context(place.locked())
        yield place, executor


def _start(place: Place, executor: int, recipe: Recipe) -> socket.socket:
    """Start a parent, and connect to it; it answers when it has done its imports."""
    _started[:] = [process for process in _started if process.poll() is None]
    _make_room(place)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(place.address)
        listener.listen(_BACKLOG)
        descriptors = (listener.fileno(), executor, place.folder)
        command = [sys.executable, "-m", "hvdspark.worker.warm", *map(str, descriptors), place.name, *recipe.modules]
        parent = subprocess.Popen(
            command,
            # It may live longer than the task, and must not hold open what others wait for the end of.
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=recipe.environment,
            pass_fds=descriptors,
            start_new_session=True,
        )
        _started.append(parent)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(place.address)
        return connection


def _reached(place: Place) -> socket.socket | None:
    """Connect to the parent, where there is one, and note that it was of use."""
    connection = place.connect()
    if connection is not None:
        with contextlib.suppress(FileNotFoundError):  # it goes as this looks
            os.utime(place.name, dir_fd=place.folder)
    return connection


def _make_room(place: Place) -> None:
    """Remove what parents have left that were killed, and of the executor's others those of the longest ago."""
    place.evict()
    executor = place.name.partition("-")[0]
    others = []
    for name in os.listdir(place.folder):  # noqa: PTH208 - a descriptor
        owner, is_socket, _ = name.partition("-")
        other = Place(place.folder, name)
        if is_socket and other.is_deserted():
            other.unlink()
        elif owner == executor:
            others.append(other)
    others.sort(key=Place.used_at)
    for other in others[: max(0, len(others) - MAX_PARENTS + 1)]:
        other.evict()


def _open_folder() -> int:
    """Open the folder of this user's sockets, making it where it is missing.

    Raises
    ------
    OSError
        When it is not a folder that only this user can enter.
    """
    path = Path(tempfile.gettempdir()) / f"hvdspark-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    found = os.fstat(folder)
    if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
        os.close(folder)
        raise PermissionError(f"{path} is open to other users, or belongs to one")
    return folder


def _key(recipe: Recipe) -> str:
    """Name all that a parent's imports depend on."""
    parts = [
        sys.executable,
        sys.version,
        sorted(recipe.environment.items()),
        recipe.modules,
        str(Path.cwd()),
        # Containers may share the folder, but neither process numbers nor the limits of their memory.
        Path("/proc/self/ns/pid").stat().st_ino,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
