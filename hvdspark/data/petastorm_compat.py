"""Lets Petastorm 0.13 import and run on current pyarrow and NumPy. Take all that is of petastorm from here.

Petastorm 0.13 was written for pyarrow <= 14 and NumPy 1. This module gives back the few names that it needs,
supplies the dataset classes that pyarrow dropped, and repairs a race in its thread pool that loses rows. It is the
only place of this library that changes another one, and everything it changes is listed in :func:`install`.
"""

from __future__ import annotations

import importlib
import posixpath
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

# Petastorm's modules that call pq.ParquetDataset or pq.ParquetDatasetPiece.
_USERS_OF_PARQUET_DATASET = (
    "petastorm.reader",
    "petastorm.arrow_reader_worker",
    "petastorm.py_dict_reader_worker",
    "petastorm.etl.dataset_metadata",
    "petastorm.etl.rowgroup_indexing",
    "petastorm.etl.metadata_util",
)


class ParquetDatasetPiece:
    """A Parquet file, or one row group of it: the part of pyarrow <= 14's class that Petastorm uses."""

    def __init__(
        self,
        path: str,
        open_file_func: Callable[..., Any] | None = None,
        row_group: int | None = None,
        partition_keys: Sequence[tuple[str, int]] = (),
    ) -> None:
        self.path = path
        self.row_group = row_group
        self.partition_keys = list(partition_keys)
        self._open = open_file_func or open

    def get_metadata(self) -> pq.FileMetaData:
        """Read the file's footer."""
        with self._open(self.path, "rb") as file:
            return pq.ParquetFile(file).metadata

    def read(self, columns: Sequence[str] | None = None, **_: Any) -> pa.Table:
        """Read the piece's rows; partitions, which Petastorm names too, there are none."""
        wanted = None if columns is None else list(columns)
        with self._open(self.path, "rb") as file:
            parquet = pq.ParquetFile(file)
            if self.row_group is None:
                return parquet.read(columns=wanted)
            return parquet.read_row_group(self.row_group, columns=wanted)


class ParquetDataset:
    """The files of a dataset: the part of pyarrow <= 14's class that Petastorm uses.

    Hive partitions (``key=value`` folders) are refused: without partition columns their values would be lost.
    """

    partitions = None

    def __init__(self, path_or_paths: str | list[str], filesystem: Any = None, filters: Any = None, **_: Any) -> None:
        if filters is not None:
            raise NotImplementedError("filters= is not supported on this pyarrow; filter with Spark before writing")
        self.fs = filesystem if filesystem is not None else LocalFileSystem()
        self.paths = path_or_paths
        files = path_or_paths if isinstance(path_or_paths, list) else self._find(path_or_paths)
        self.pieces = [ParquetDatasetPiece(path, open_file_func=self.fs.open) for path in files]
        self.metadata_path = self._beside("_metadata")
        self.metadata = self._footer(self.metadata_path)
        self.common_metadata = self._footer(self._beside("_common_metadata"))

    @property
    def schema(self) -> pq.ParquetSchema:
        """Schema of the first file."""
        return self.pieces[0].get_metadata().schema

    def _find(self, root: str) -> list[str]:
        if self.fs.isfile(root):
            return [root]
        found = []
        for path in sorted(self.fs.find(root)):
            names = posixpath.relpath(path, root).split("/")
            if any(name.startswith((".", "_")) for name in names) or names[-1].endswith(".crc"):
                continue
            if any("=" in name for name in names[:-1]):
                raise NotImplementedError(f"'{path}' is in a Hive partition, which is not supported on this pyarrow")
            found.append(path)
        return found

    def _beside(self, name: str) -> str | None:
        return None if isinstance(self.paths, list) else posixpath.join(self.paths.rstrip("/"), name)

    def _footer(self, path: str | None) -> pq.FileMetaData | None:
        if path is None or not self.fs.exists(path):
            return None
        with self.fs.open(path, "rb") as file:
            return pq.read_metadata(file)


class _ParquetModule(types.ModuleType):
    """``pyarrow.parquet`` with the two classes in their old place."""

    ParquetDataset = ParquetDataset
    ParquetDatasetPiece = ParquetDatasetPiece

    def __getattr__(self, name: str) -> Any:
        return getattr(pq, name)


def install() -> None:
    """Make petastorm importable and correct; a second call changes nothing.

    Changed outside petastorm: ``np.unicode_``, ``np.string_``; the modules ``pyarrow.filesystem`` and
    ``pyarrow.hdfs``, with ``pa.filesystem``, ``pa.hdfs``, ``pa.LocalFileSystem``, ``pa.localfs`` and
    ``pa.lib.ArrowIOError``. Changed in petastorm: ``pq`` in the modules named above, and
    ``ThreadPool.current_worker_done``.
    """
    _restore_numpy_names()
    _restore_pyarrow_names()
    parquet = _ParquetModule("pyarrow.parquet")
    for name in _USERS_OF_PARQUET_DATASET:
        importlib.import_module(name).pq = parquet  # type: ignore[attr-defined]
    _repair_thread_pool()


def _restore_numpy_names() -> None:
    for old, new in (("unicode_", np.str_), ("string_", np.bytes_)):
        # NumPy 2 raises on hasattr() for the names it removed, so look into the namespace itself.
        if old not in vars(np):
            setattr(np, old, new)


def _restore_pyarrow_names() -> None:
    if "pyarrow.filesystem" in sys.modules:
        return
    filesystem: Any = types.ModuleType("pyarrow.filesystem")
    filesystem.LocalFileSystem = LocalFileSystem
    filesystem.FileSystem = fsspec.AbstractFileSystem
    hdfs: Any = types.ModuleType("pyarrow.hdfs")
    hdfs.HadoopFileSystem = type("HadoopFileSystem", (fsspec.AbstractFileSystem,), {})
    sys.modules["pyarrow.filesystem"] = filesystem
    sys.modules["pyarrow.hdfs"] = hdfs
    pa.filesystem = filesystem
    pa.hdfs = hdfs
    pa.LocalFileSystem = LocalFileSystem
    pa.localfs = LocalFileSystem()
    pa.lib.ArrowIOError = OSError


def _repair_thread_pool() -> None:
    """Keep ``ThreadPool`` from losing rows and from mixing up their order.

    ``get_results`` takes a worker for done when it has worked off what it was given so far. But more may come: with all
    workers done for the moment, and the ventilator finished a moment later, what was ventilated in between is never
    read, and a finite pass silently lacks rows. And a worker that is passed by delivers its item after later ones. A
    worker is done only when nothing more will be ventilated, which must be asked first.
    """
    from petastorm.workers_pool.thread_pool import ThreadPool

    if getattr(ThreadPool.current_worker_done, "repaired", False):
        return
    idle = ThreadPool.current_worker_done

    def current_worker_done(self: Any, worker_id: int) -> bool:
        ventilated = self._ventilator is None or self._ventilator.completed()
        return bool(ventilated and idle(self, worker_id))

    current_worker_done.repaired = True  # type: ignore[attr-defined]
    ThreadPool.current_worker_done = current_worker_done


install()

# What the library uses of Petastorm; only here is it certain that install() came first.
from petastorm.codecs import NdarrayCodec, ScalarCodec  # noqa: E402
from petastorm.etl.dataset_metadata import ROW_GROUPS_PER_FILE_KEY, UNISCHEMA_KEY  # noqa: E402
from petastorm.reader import Reader, make_batch_reader, make_reader  # noqa: E402
from petastorm.unischema import Unischema, UnischemaField  # noqa: E402
from petastorm.workers_pool import EmptyResultError  # noqa: E402
from petastorm.workers_pool.thread_pool import ThreadPool  # noqa: E402
from petastorm.workers_pool.ventilator import ConcurrentVentilator  # noqa: E402
from petastorm.workers_pool.worker_base import WorkerBase  # noqa: E402

__all__ = [
    "ROW_GROUPS_PER_FILE_KEY",
    "UNISCHEMA_KEY",
    "ConcurrentVentilator",
    "EmptyResultError",
    "NdarrayCodec",
    "Reader",
    "ScalarCodec",
    "ThreadPool",
    "Unischema",
    "UnischemaField",
    "WorkerBase",
    "install",
    "make_batch_reader",
    "make_reader",
]
