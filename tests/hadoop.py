"""A folder of this machine that behaves as HDFS does through pyarrow and fsspec, for want of a cluster."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from fsspec.implementations.arrow import ArrowFSWrapper
from pyarrow.fs import FileSelector, FileType, LocalFileSystem


class FolderAsHdfs(ArrowFSWrapper):  # type: ignore[misc] # fsspec has no types
    """What is above libhdfs, on a local folder; see ``cpp/src/arrow/filesystem/hdfs.cc``."""

    protocol = "hdfs"

    def __init__(self, **_: Any) -> None:
        super().__init__(fs=LocalFileSystem())
        self.is_reachable = True

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        """Look at a file, and say of whatever cannot be looked at that it is not there, as GetFileInfo does."""
        if not self.is_reachable:
            raise FileNotFoundError(path)
        found: dict[str, Any] = super().info(path, **kwargs)
        return found

    def ls(self, path: str, detail: bool = False, **kwargs: Any) -> Any:
        """List a folder; here an error is one."""
        self._reach()
        with _at_one_moment(self._strip_protocol(path)):
            return super().ls(path, detail=detail, **kwargs)

    def _open(self, path: str, mode: str = "rb", block_size: Any = None, seekable: bool = True, **kwargs: Any) -> Any:
        self._reach()
        return super()._open(path, mode, block_size, seekable, **kwargs)

    def mv(self, path1: str, path2: str, **_: Any) -> None:
        """Rename a file; one that has the name goes first, as the NameNode's plain rename replaces none."""
        self._reach()
        if self.fs.get_file_info(self._strip_protocol(path2)).type == FileType.File:
            self.rm_file(path2)
        self.rename(self._strip_protocol(path1), self._strip_protocol(path2))

    def rename(self, path1: str, path2: str) -> None:
        """Rename a file to a name that none has."""
        with _at_one_moment(str(Path(path2).parent)):
            self.fs.move(path1, path2)

    def rm_file(self, path: str) -> None:
        """Remove a file; what is not there is an error without a number, as libhdfs has it."""
        self._reach()
        if self.fs.get_file_info(self._strip_protocol(path)).type == FileType.NotFound:
            raise OSError(5, f"HDFS delete failed, errno: 5 (Input/output error): {path}")
        super().rm_file(path)

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        """Remove a file or a folder; errors as above."""
        if self.isdir(path):
            super().rm(path, recursive, maxdepth)
        else:
            self.rm_file(path)

    def names(self, path: str) -> set[str]:
        """Return all that is below a folder, also files that are being written."""
        found = self.fs.get_file_info(FileSelector(path, recursive=True))
        return {str(Path(entry.path).relative_to(path)) for entry in found}

    def _reach(self) -> None:
        if not self.is_reachable:
            raise OSError(5, "HDFS: no NameNode answers")


@contextlib.contextmanager
def _at_one_moment(folder: str) -> Iterator[None]:
    """Keep a folder as it is while it is listed: the NameNode does one thing after the other."""
    if not Path(folder).is_dir():
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def folder_as_hdfs(kind: type[FolderAsHdfs] = FolderAsHdfs) -> Iterator[None]:
    """Have ``hdfs://host/path`` mean the folder ``/path`` of this machine, for the time of a block."""
    kind.clear_instance_cache()
    with mock.patch.dict("fsspec.registry._registry", {"hdfs": kind}):
        yield
    kind.clear_instance_cache()
