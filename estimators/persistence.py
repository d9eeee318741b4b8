"""Saving and loading estimators and models as Spark ML does: JSON metadata, with files beside it. No pickle.

::

    path/metadata/part-00000   class, uid, parameters, and the checksum of each file
    path/<file>                such as model.keras

The metadata comes last, so that a folder whose writing was cut off is not taken for whole.
"""

from __future__ import annotations

import abc
import hashlib
import re
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from py4j.protocol import Py4JJavaError
from pyspark.errors import AnalysisException, PySparkException
from pyspark.ml.param import Params
from pyspark.ml.util import DefaultParamsReader, DefaultParamsWriter, MLReadable, MLReader, MLWritable, MLWriter
from pyspark.sql import SparkSession

from hvdspark.errors import ModelFormatError, first_line

_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


class Persistable(Params, MLWritable, MLReadable[Any], abc.ABC):
    """Saves as JSON metadata and files; subclasses say which.

    Attributes
    ----------
    _origin : str
        From where it was loaded, for error messages; empty where it was not.
    """

    _origin: str = ""

    @abc.abstractmethod
    def _to_files(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """Return JSON values for the metadata, and files by name."""

    @classmethod
    @abc.abstractmethod
    def _from_files(cls, extra: Mapping[str, Any], files: Mapping[str, bytes]) -> Self:
        """Make an instance of what :meth:`_to_files` gave."""

    def write(self) -> FilesWriter:
        """Return a writer; ``write().overwrite().save(path)`` replaces what is there."""
        return FilesWriter(self)

    def save(self, path: str) -> None:
        """Save to a path of any file system that Spark writes to; fails when there is something already."""
        self.write().save(path)

    @classmethod
    def read(cls) -> FilesReader:
        """Return a reader."""
        return FilesReader(cls)

    @classmethod
    def load(cls, path: str) -> Self:
        """Load what was saved.

        Raises
        ------
        ModelFormatError
            When a file is missing or is not the one that was saved.
        """
        return cls.read().load(path)  # type: ignore[no-any-return]


class FilesWriter(MLWriter):
    """Writes a :class:`Persistable`."""

    def __init__(self, instance: Persistable) -> None:
        super().__init__()
        self._instance = instance

    def saveImpl(self, path: str) -> None:
        """Write the files, then the metadata that says that they are whole."""
        filesystem, folder = _hadoop(self.sparkSession, path)
        if filesystem.exists(folder):
            raise ModelFormatError(f"{path} exists already; write().overwrite().save(path) replaces it")
        extra, files = self._instance._to_files()
        checksums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
        for name, data in files.items():
            _write_file(self.sparkSession, f"{path}/{name}", data)
        DefaultParamsWriter.saveMetadata(
            self._instance, path, self.sparkSession, extraMetadata={"hvdspark": {**extra, "files": checksums}}
        )


class FilesReader(MLReader[Any]):
    """Reads a :class:`Persistable`."""

    def __init__(self, cls: type[Persistable]) -> None:
        super().__init__()
        self._cls = cls

    def load(self, path: str) -> Any:
        """Read the metadata, then the files it names, and compare their checksums."""
        metadata = self._metadata(path)
        expected = f"{self._cls.__module__}.{self._cls.__name__}"
        if metadata.get("class") != expected:
            raise ModelFormatError(
                f"{path} holds a {metadata.get('class')}, not a {expected}; load it with its own class"
            )
        try:
            extra = metadata["hvdspark"]
            files = {name: self._file(path, name, checksum) for name, checksum in extra["files"].items()}
            instance = self._cls._from_files(extra, files)
            instance._resetUid(str(metadata["uid"]))
            DefaultParamsReader.getAndSetParams(instance, metadata)
        except ModelFormatError as exc:
            if path in str(exc):
                raise
            raise ModelFormatError(f"{path}: {exc}") from exc
        except (KeyError, TypeError, AttributeError, ValueError) as exc:
            raise ModelFormatError(
                f"the metadata of {path} lacks what a {expected} needs, or has something else in its place: {exc!r}"
            ) from exc
        instance._origin = path
        return instance

    def _metadata(self, path: str) -> dict[str, Any]:
        """Read the metadata as the JSON object that it is, or say that it is not; an absent one is Spark's error."""
        try:
            found = DefaultParamsReader.loadMetadata(path, self.sparkSession)
        except AnalysisException:
            raise
        except (ValueError, TypeError, PySparkException, Py4JJavaError) as exc:
            raise ModelFormatError(f"{path}/metadata is damaged, or Spark ML did not write it: {_cause(exc)}") from exc
        if not isinstance(found, dict):
            raise ModelFormatError(f"{path}/metadata holds a {type(found).__name__}, no JSON object")
        return found

    def _file(self, path: str, name: str, checksum: str) -> bytes:
        """Read a file that the metadata names and make sure that it is the one that was saved."""
        if not _FILE_NAME.fullmatch(name):
            raise ModelFormatError(f"the metadata of {path} names the file '{name}', which is no name in that folder")
        data = read_file(self.sparkSession, f"{path}/{name}")
        if hashlib.sha256(data).hexdigest() != checksum:
            raise ModelFormatError(f"{path}/{name} is not the file that was saved (its checksum differs)")
        return data


def _write_file(spark: SparkSession, path: str, data: bytes) -> None:
    """Write through Hadoop, as Spark writes the metadata, so that every path Spark knows will do."""
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / uuid.uuid4().hex
        local.write_bytes(data)
        filesystem, target = _hadoop(spark, path)
        filesystem.copyFromLocalFile(True, True, _path(spark, local.as_uri()), target)


def read_file(spark: SparkSession, path: str) -> bytes:
    """Read a file through Hadoop; raises :class:`ModelFormatError` when that cannot be."""
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / uuid.uuid4().hex
        filesystem, source = _hadoop(spark, path)
        if not filesystem.exists(source):
            raise ModelFormatError(f"{path} is missing, though the metadata names it")
        # The last argument keeps Hadoop from leaving a checksum file of its own.
        try:
            filesystem.copyToLocalFile(False, source, _path(spark, local.as_uri()), True)
        except Py4JJavaError as exc:
            raise ModelFormatError(f"{path} cannot be read: {_cause(exc)}") from exc
        return local.read_bytes()


def list_folder(spark: SparkSession, path: str) -> list[str]:
    """List the names in a folder through Hadoop, sorted; an absent one is empty, and so is a file."""
    try:
        filesystem, folder = _hadoop(spark, path)
        if not filesystem.exists(folder):
            return []
        return sorted(str(entry.getPath().getName()) for entry in filesystem.listStatus(folder))
    except Py4JJavaError as exc:
        raise ModelFormatError(f"{path} cannot be read: {_cause(exc)}") from exc


def _cause(exc: Exception) -> str:
    return first_line(exc.java_exception if isinstance(exc, Py4JJavaError) else exc)


def _hadoop(spark: SparkSession, path: str) -> tuple[Any, Any]:
    target = _path(spark, path)
    context: Any = spark.sparkContext
    return target.getFileSystem(context._jsc.hadoopConfiguration()), target


def _path(spark: SparkSession, path: str) -> Any:
    context: Any = spark.sparkContext
    return context._jvm.org.apache.hadoop.fs.Path(path)
