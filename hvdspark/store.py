"""``Store``: one folder, local or remote, that the driver and all ranks can reach.

Datasets, checkpoints and models live in it. Everything is published atomically: a reader finds a file whole or
not at all, also when the writer dies half-way.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import posixpath
import re
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import fsspec
from fsspec.core import url_to_fs

from hvdspark.errors import ParamError, StoreError, closest
from hvdspark.plan import StoreRef
from hvdspark.shelf import Removed, collect

# Schemes as Hadoop spells them, and what fsspec calls the same file system.
_HADOOP_SCHEMES = {"s3a": "s3", "s3n": "s3", "wasb": "abfs", "wasbs": "abfs"}

# Object stores show an object only once its upload is complete, and rename by copying: writing in place is the
# atomic way there. Everywhere else a file is written beside its final name and then renamed.
_OBJECT_STORES = frozenset({"s3", "gs", "gcs", "abfs", "abfss", "az", "adl", "oss", "memory"})

# Those of fsspec's file systems that keep listings, so that what another process changes would never be seen, and that
# take the option not to. Others may hand it on to a client that does not know it, as SFTP's does.
_KEEP_LISTINGS = frozenset({"s3", "gs", "gcs", "abfs", "abfss", "az", "oss", "ftp", "dbfs"})

# How a file is called while it is being written.
_UNFINISHED = re.compile(r"\.[0-9a-f]{32}\.part$")

# And where no file can replace another: while the one before it goes; it is read by this name meanwhile. The time is
# when it got it, so that the last of several can be told.
_COMING = re.compile(r"\.(\d{20})-[0-9a-f]{8}\.part$")

# Who is at a step of replacing a file for longer has died. Hosts' clocks may differ by less.
_STALE_NS = 3600 * 10**9

# How often a step is tried again because another process was faster.
_TRIES = 10

_ABSENT = (FileNotFoundError, NotADirectoryError)

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=-]*")
_PASSWORD = re.compile(r"://[^/@]*:[^/@]+@")

_PRIVATE_FOLDER, _PRIVATE_FILE, _USUAL_FILE = 0o700, 0o600, 0o666


class Store:
    """A folder for datasets, checkpoints and models, local or on any file system that fsspec knows.

    Parameters
    ----------
    url
        A path (``/shared/experiments``) or an fsspec URL (``hdfs://…``, ``s3://bucket/prefix``, …). The driver
        and every executor must reach the same folder by it.
    storage_options
        Passed to fsspec, for instance ``{"endpoint_url": …}``. They travel to the ranks, but are never written
        to the Store or into saved estimators; prefer credentials from the environment.
    private
        Whether what is made in a local Store is for this user alone (folders 0700, files 0600), which is how driver and
        executors that run as one user want it. ``False`` goes by the ``umask``, for executors that run as another
        user, and for teams that share a Store by a group. Folders that are there already keep their permissions.
    max_dataset_bytes, max_dataset_age_s
        How much the datasets that fits leave for later ones may hold together, and seconds without use after which
        they go; see :meth:`gc`.

    Examples
    --------
    >>> store = Store.create("/tmp/experiments")
    >>> store.url
    '/tmp/experiments'
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        storage_options: Mapping[str, Any] | None = None,
        *,
        private: bool = True,
        max_dataset_bytes: float = 100 << 30,
        max_dataset_age_s: float = 7 * 86400,
    ) -> None:
        if _PASSWORD.search(os.fspath(url)):
            raise ParamError(
                "the Store's address has a password in it, and addresses are logged, saved and shown in errors; give it"
                " by storage_options, or by the environment",
                param="prefix_path",
            )
        self._private = private
        self._options = dict(storage_options or {})
        self._max_dataset_bytes = max_dataset_bytes
        self._max_dataset_age_s = max_dataset_age_s
        self.url = normalized(os.fspath(url))
        # A folder that must be there already, so that one which has gone is noticed, and not made anew.
        self._needed: str | None = None
        try:
            self._fs, self._root = url_to_fs(self.url, **{**_fresh(self.url), **self._options})
        except (ValueError, ImportError) as exc:
            scheme = self.url.split("://", 1)[0]
            hint = closest(scheme, fsspec.available_protocols())
            raise StoreError(f"cannot open the Store '{self.url}': {exc}.{hint}", url=self.url) from exc

    @classmethod
    def create(
        cls,
        prefix_path: str | os.PathLike[str],
        storage_options: Mapping[str, Any] | None = None,
        *,
        private: bool = True,
        **limits: float,
    ) -> Store:
        """Open a Store, as ``horovod.spark``'s ``Store.create`` does; see the class for the parameters."""
        return cls(prefix_path, storage_options, private=private, **limits)

    @classmethod
    def from_ref(cls, ref: StoreRef) -> Store:
        """Open the Store that :meth:`ref` described in another process; a local one must be there by now."""
        store = cls(ref.url, ref.storage_options, private=ref.private)
        store._needed = store._root if store.is_local else None
        return store

    def within(self, *parts: str) -> Store:
        """Return this Store for work in a folder that exists: where that has gone, nothing is written or listed.

        So what is written never goes into the empty place where a file system was mounted before, and nobody takes a
        Store that is out of reach for an empty one.
        """
        store = Store.from_ref(self.ref())
        store._needed = self.path(*parts)
        return store

    def ref(self) -> StoreRef:
        """Describe this Store by plain values, to open it in another process."""
        return StoreRef(self.url, self._options, self._private)

    def __repr__(self) -> str:
        return f"Store({self.url!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Store) and self.ref() == other.ref()

    def __hash__(self) -> int:
        return hash(self.url)

    @property
    def filesystem(self) -> fsspec.AbstractFileSystem:
        """The fsspec file system behind the Store."""
        return self._fs

    @property
    def private(self) -> bool:
        """Whether what is made in it is for this user alone, where it is local."""
        return self._private

    @property
    def is_local(self) -> bool:
        """Whether the Store is a folder of this machine's file system."""
        return "file" in _protocols(self._fs)

    def path(self, *parts: str) -> str:
        """Return the file system's own path of something in the Store.

        Parameters
        ----------
        parts
            Names relative to the Store; each may hold slashes, none may leave the Store.

        Raises
        ------
        ParamError
            When a name is empty, absolute, or has ``..`` or other odd characters in it.
        """
        names = [name for part in parts for name in part.split("/")]
        for name in names:
            if not _NAME.fullmatch(name):
                raise ParamError(
                    f"'{'/'.join(parts)}' is no name inside the Store: use letters, digits, '_', '-', '.' and '='"
                    " between slashes",
                    param="name",
                )
        return posixpath.join(self._root, *names)

    def url_of(self, *parts: str) -> str:
        """Return the address of something in the Store, to show or to give to other programs."""
        self.path(*parts)
        return posixpath.join(self.url, *parts)

    def exists(self, *parts: str) -> bool:
        """Whether there is a file or folder of that name.

        Raises
        ------
        StoreError
            When that cannot be told.
        """
        with self._named("look for", *parts):
            found = self._is_there(self.path(*parts))
            if not found:
                self._check_there()
            return found

    def list(self, *parts: str) -> list[str]:
        """List the names in a folder, sorted, without files that are being written; an absent folder is empty.

        Raises
        ------
        StoreError
            When it cannot be listed.
        """
        names = {_name_of(entry) for entry in self._entries(*parts, detail=False)}
        return sorted(name for name in names if not _UNFINISHED.search(name))

    def sizes(self, *parts: str) -> dict[str, int]:
        """Return the files in a folder with their sizes in bytes, by name; an absent folder is empty.

        Raises
        ------
        StoreError
            When it cannot be listed.
        """
        files = [entry for entry in self._entries(*parts, detail=True) if entry["type"] == "file"]
        # Of several names of a file its own counts, or else the last.
        files.sort(key=lambda entry: (_COMING.search(entry["name"]) is None, entry["name"]))
        return {_name_of(entry["name"]): int(entry["size"]) for entry in files}

    def read_bytes(self, *parts: str) -> bytes:
        """Read a file.

        Raises
        ------
        StoreError
            When there is none, or it cannot be read.
        """
        with self._named("read", *parts):
            return self._content(self.path(*parts))

    def find_bytes(self, *parts: str) -> bytes | None:
        """Read a file; ``None`` where there is none.

        Raises
        ------
        StoreError
            When it cannot be read, or nobody can tell whether there is one.
        """
        with self._named("read", *parts):
            try:
                return self._content(self.path(*parts))
            except _ABSENT:
                self._check_there()
                return None

    def read_json(self, *parts: str) -> dict[str, Any] | None:
        """Read a JSON object; ``None`` where there is no such file, or something else is in it.

        Raises
        ------
        StoreError
            When it cannot be read, or nobody can tell whether there is one.
        """
        data = self.find_bytes(*parts)
        try:
            found = None if data is None else json.loads(data)
        except ValueError:
            return None
        return found if isinstance(found, dict) else None

    def publish_bytes(self, data: bytes, *parts: str) -> None:
        """Write a file atomically, replacing one of the same name.

        HDFS, as pyarrow offers it, replaces no file by another: there it is done in steps, and whoever reads meanwhile,
        or after the writer died half-way, finds the old or the new one all the same.

        Raises
        ------
        StoreError
            When it cannot be written; the file of that name is then as it was before.
        """
        target = self.path(*parts)
        with self._named("write", *parts):
            self._check_there()
            self._make_folders(posixpath.dirname(target))
            if self._is_object_store:
                self._fs.pipe_file(target, data)
                return
            beside = f"{target}.{uuid.uuid4().hex}.part"  # see _UNFINISHED
            try:
                with self._create(beside) as file:
                    file.write(data)
                    _sync(file)
                self._replace(beside, target)
            except BaseException:
                self._discard(beside)
                raise

    def open_file(self, *parts: str) -> IO[bytes]:
        """Open a file to write it bit by bit; others may see it before it is whole. Its folder is made.

        Raises
        ------
        OSError
            When that cannot be.
        """
        path = self.path(*parts)
        self._make_folders(posixpath.dirname(path))
        return self._create(path)

    def publish_file(self, source: str | os.PathLike[str], *parts: str) -> None:
        """Copy a local file into the Store atomically; errors as :meth:`publish_bytes`."""
        self.publish_bytes(Path(source).read_bytes(), *parts)

    def make_folder(self, *parts: str) -> None:
        """Make a folder and those above it; one that exists stays.

        Raises
        ------
        StoreError
            When it cannot be made.
        """
        with self._named("make the folder", *parts):
            self._check_there()
            self._make_folders(self.path(*parts))

    def delete(self, *parts: str) -> None:
        """Remove a file or a folder with all that is in it; an absent one is fine.

        Raises
        ------
        StoreError
            When it cannot be removed.
        """
        if not parts:
            raise ParamError("name what to delete: the Store itself is never deleted", param="parts")
        path = self.path(*parts)
        with self._named("delete", *parts):
            for coming in self._coming(path) if self._replaces_in_steps else ():
                self._remove(coming)
            self._remove(path)

    def delete_if_empty(self, *parts: str) -> None:
        """Remove a folder that has nothing in it; one that is not empty, or absent, stays as it is.

        On HDFS all stay: what pyarrow offers there removes them with what is in them.
        """
        if self._is_hdfs:
            return
        with contextlib.suppress(OSError, NotImplementedError):
            self._fs.rmdir(self.path(*parts))

    def gc(
        self, max_bytes: float | None = None, max_age_s: float | None = None, *, dry_run: bool = False
    ) -> Sequence[Removed]:
        """Remove datasets that earlier fits left: those not used for long, and the oldest where they are too many.

        Every fit that writes a dataset does this by itself. Datasets that a fit uses stay, and so do runs and models.

        Parameters
        ----------
        max_bytes, max_age_s
            As for the class; by default the Store's own limits. ``max_bytes=0`` removes all that no fit uses.
        dry_run
            Only say what would go.

        Returns
        -------
        sequence of Removed
            Folder, size and reason of what went, or would go.
        """
        max_bytes = self._max_dataset_bytes if max_bytes is None else max_bytes
        max_age_s = self._max_dataset_age_s if max_age_s is None else max_age_s
        return collect(self, max_bytes, max_age_s, dry_run=dry_run)

    def check_there(self) -> None:
        """Make sure that something has been written into the Store, so that one of that name is not just empty.

        Raises
        ------
        ParamError
            When its folder is not there.
        StoreError
            When that cannot be told.
        """
        if not self.exists():
            raise ParamError(
                f"there is no Store at '{self.url}': nothing has that address. Check its spelling, and that its file"
                " system is mounted; the first fit into a Store makes it",
                param="store",
            )

    def check_writable(self) -> None:
        """Write and remove a small file, to find out before a job what would fail after it.

        Raises
        ------
        StoreError
            When the Store cannot be written.
        """
        probe = f"probe-{uuid.uuid4().hex}"
        try:
            self.publish_bytes(b"", probe)
            self.delete(probe)
        except StoreError as exc:
            raise StoreError(
                f"the Store '{self.url}' is not writable: {exc.__cause__ or exc}. Give a folder that the driver and"
                " all executors can write.",
                url=self.url,
            ) from exc

    @property
    def _is_object_store(self) -> bool:
        return bool(_OBJECT_STORES & _protocols(self._fs))

    @property
    def _is_hdfs(self) -> bool:
        return "hdfs" in _protocols(self._fs)

    @property
    def _replaces_in_steps(self) -> bool:
        """Whether the file system, such as HDFS, renames no file to the name of another, see `_replace`."""
        return not (self.is_local or self._is_object_store)

    def _content(self, path: str) -> bytes:
        for _ in range(_TRIES if self._replaces_in_steps else 0):
            with contextlib.suppress(*_ABSENT):
                return bytes(self._fs.cat_file(path))
            with contextlib.suppress(*_ABSENT, IndexError):
                return bytes(self._fs.cat_file(self._coming(path)[-1]))
            if not self._is_there(path):
                break
        try:
            return bytes(self._fs.cat_file(path))
        except OSError as exc:
            if exc.errno != errno.ESTALE:
                raise
            # NFS says so of a file that another host replaced while it was open.
            return bytes(self._fs.cat_file(path))

    def _is_there(self, path: str) -> bool:
        """Look for a file or folder; unlike fsspec's own ``exists``, an error is none that it is absent."""
        try:
            if self.is_local:
                Path(path).stat()
            else:
                self._fs.info(path)
        except _ABSENT:
            # It may be about to be replaced. And pyarrow says of all that it cannot look up on HDFS that it is absent,
            # also while nobody answers; to list a folder is an error then.
            return self._replaces_in_steps and posixpath.basename(path) in map(_name_of, self._names_beside(path))
        return True

    def _names_beside(self, path: str) -> set[str]:
        """Return the names in the folder of a file, also of files that are being written."""
        try:
            found = self._fs.ls(posixpath.dirname(path), detail=False)
        except _ABSENT:
            return set()
        return {posixpath.basename(entry.rstrip("/")) for entry in found}

    def _coming(self, path: str) -> Sequence[str]:
        """Return the files that are to replace one, the last at the end."""
        names = self._names_beside(path) - {posixpath.basename(path)}
        found = sorted(name for name in names if _name_of(name) == posixpath.basename(path))
        return [posixpath.join(posixpath.dirname(path), name) for name in found]

    def _make_folders(self, path: str) -> None:
        """Make a folder and those above it that are missing."""
        if not (self.is_local and self._private):
            self._fs.makedirs(path, exist_ok=True)
            return
        folder = Path(path)
        missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        for parent in reversed(missing):
            parent.mkdir(_PRIVATE_FOLDER, exist_ok=True)  # mkdir(parents=True) would give those above other modes
        if not folder.is_dir():
            raise NotADirectoryError(f"{path} is no folder")

    def _create(self, path: str) -> IO[bytes]:
        if not self.is_local:
            stream: IO[bytes] = self._fs.open(path, "wb")
            return stream
        # A link that lies in the file's place might lead out of the Store.
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.fdopen(os.open(path, flags, _PRIVATE_FILE if self._private else _USUAL_FILE), "wb")

    def _entries(self, *parts: str, detail: bool) -> Sequence[Any]:
        """List a folder as fsspec does; an absent one is empty."""
        with self._named("list", *parts):
            try:
                found: Sequence[Any] = self._fs.ls(self.path(*parts), detail=detail)
            except _ABSENT:
                self._check_there()
                return ()
        return found

    def _replace(self, source: str, target: str) -> None:
        """Give a file its name, which another one may have; whoever reads it meanwhile finds one of the two."""
        if self.is_local:
            # fsspec's own move is shutil.move, which copies where a rename is refused.
            Path(source).replace(target)
            return
        others = self._coming(target)
        if not others and not self._is_there(target):
            self._fs.mv(source, target)
            return
        coming = f"{target}.{time.time_ns():020d}-{uuid.uuid4().hex[:8]}.part"  # see _COMING
        self._fs.mv(source, coming)
        self._remove(target)
        self._rename(coming, target)
        for other in others:
            found = _COMING.search(other)
            if found and time.time_ns() - int(found[1]) > _STALE_NS:
                self._remove(other)

    def _rename(self, source: str, target: str) -> None:
        for left in reversed(range(_TRIES)):
            try:
                self._fs.mv(source, target)
            except OSError:
                if not left:
                    raise
            else:
                return

    def _remove(self, path: str) -> None:
        for left in reversed(range(_TRIES if self._replaces_in_steps else 1)):
            try:
                self._fs.rm(path, recursive=True)
            except OSError:
                # HDFS has no word for what is absent; and another may just have written it.
                is_there = posixpath.basename(path) in self._names_beside(path)
                if is_there and not left:
                    raise
                if is_there:
                    continue
            return

    def _discard(self, path: str) -> None:
        with contextlib.suppress(Exception):  # what went wrong before is what is to be told
            self._fs.rm_file(path)

    def _check_there(self) -> None:
        if self._needed is not None and not self._is_there(self._needed):
            raise FileNotFoundError(
                errno.ENOENT, "the folder has gone, or its file system is no longer mounted", self._needed
            )

    @contextlib.contextmanager
    def _named(self, act: str, *parts: str) -> Iterator[None]:
        """Turn what a file system raises into a :class:`StoreError` with the address."""
        url = self.url_of(*parts)
        try:
            yield
        except Exception as exc:  # each file system's library has errors of its own
            raise StoreError(f"cannot {act} {url}: {str(exc) or type(exc).__name__}", url=url) from exc


def require_store(store: object) -> Store:
    """Return what is a Store; raises :class:`ParamError` for anything else."""
    if not isinstance(store, Store):
        raise ParamError(
            f"store={store!r} is a {type(store).__name__}; give hvdspark.Store.create('/shared/folder')", param="store"
        )
    return store


def normalized(url: str) -> str:
    """Spell a URL as fsspec does and drop slashes at its end."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        rest = scheme
        if rest.startswith("file:"):
            rest = rest.removeprefix("file:")
        return _absolute(rest)
    if scheme == "file":
        return _absolute("/" + rest.lstrip("/"))
    return f"{_HADOOP_SCHEMES.get(scheme, scheme)}://{rest.rstrip('/')}"


def _absolute(path: str) -> str:
    # Not Path.resolve(): a link in the path may be this machine's own, and lead elsewhere on others.
    return os.path.abspath(path)  # noqa: PTH100


def _fresh(url: str) -> dict[str, Any]:
    """Return the option that has listings made anew, where the address's file system takes it."""
    return {"use_listings_cache": False} if url.split("://", 1)[0] in _KEEP_LISTINGS else {}


def _name_of(path: str) -> str:
    return _COMING.sub("", posixpath.basename(path.rstrip("/")))


def _protocols(fs: fsspec.AbstractFileSystem) -> frozenset[str]:
    return frozenset([fs.protocol] if isinstance(fs.protocol, str) else fs.protocol)


def _sync(file: Any) -> None:
    """Bring a local file to the disk before it gets its name; remote files have no descriptor."""
    file.flush()
    try:
        descriptor = file.fileno()
    except (AttributeError, OSError):
        return
    os.fsync(descriptor)
