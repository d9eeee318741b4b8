"""Finds the model that a ``warm_start`` names, and reads it as data: nothing of what was saved is run or imported."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from hvdspark.estimators.persistence import list_folder, read_file

from hvdspark.errors import ModelFormatError, ParamError, StoreError
from hvdspark.runs import MODEL
from hvdspark.store import Store
from hvdspark.warmstart import Location, WarmStart, locate

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# A PipelineModel as PySpark writes it, and as Spark does where all stages are its own.
_PIPELINES = ("pyspark.ml.pipeline.PipelineModel", "org.apache.spark.ml.PipelineModel")

# Pipelines within pipelines: a folder that is linked into itself must come to an end.
_DEEPEST = 8


class _Files(Protocol):
    def names(self, path: str) -> list[str]: ...

    def read(self, path: str) -> bytes: ...

    def address(self, path: str) -> str: ...


class _InStore:
    def __init__(self, store: Store) -> None:
        self._store = store

    def names(self, path: str) -> list[str]:
        return self._store.list(path)

    def read(self, path: str) -> bytes:
        return self._store.read_bytes(path)

    def address(self, path: str) -> str:
        return self._store.url_of(path)


class _InHadoop:
    def __init__(self, session: SparkSession) -> None:
        self._session = session

    def names(self, path: str) -> list[str]:
        return list_folder(self._session, path)

    def read(self, path: str) -> bytes:
        return read_file(self._session, path)

    def address(self, path: str) -> str:
        return path


def find_start(given: str, store: Store, session: SparkSession, saved: str, suffix: str) -> WarmStart:
    """Read the model that a ``warm_start`` names. No Spark job runs.

    Parameters
    ----------
    given
        See :func:`hvdspark.warmstart.locate`.
    store
        Where runs and aliases are.
    session
        By which addresses outside of the Store are read.
    saved
        The class, with its module, of the Models that can be taken; in a ``PipelineModel`` there must be one of it.
    suffix
        File suffix of the framework's format.

    Raises
    ------
    ParamError
        When there is no such model, or more than one.
    ModelFormatError
        When it is damaged.
    AliasError, StoreError
        When it cannot be looked up.
    """
    location = locate(store, given)
    files: _Files = _InStore(store) if location.is_inside else _InHadoop(session)
    found = _files_of(files, location, saved, suffix)
    if len(found) != 1:
        address = files.address(location.path)
        what = "no model" if not found else f"{len(found)} models ({', '.join(sorted(found))})"
        remedy = "the folder of one of them" if found else "a finished run, or what a fitted model or pipeline saved"
        raise ParamError(f"warm_start='{given}': {what} of {saved} is in {address}; give {remedy}", param="warm_start")
    ((path, checksum),) = found.items()
    data = files.read(path)
    if checksum is not None and hashlib.sha256(data).hexdigest() != checksum:
        raise ModelFormatError(f"{files.address(path)} is not the file that was saved (its checksum differs)")
    return WarmStart.of(given, files.address(path), location.run_id, data)


def _files_of(files: _Files, location: Location, saved: str, suffix: str) -> Mapping[str, str | None]:
    """Return the paths of model files at a location, with the checksums of those that have one."""
    path = location.path
    published = f"{MODEL}{suffix}"
    try:
        if path.endswith(suffix):
            folder, _, name = path.rpartition("/")
            return {path: None} if name in files.names(folder or ".") else {}
        names = files.names(path)
        if "metadata" not in names:
            return {f"{path}/{published}": None} if location.is_inside and published in names else {}
        return dict(_saved_in(files, path, saved, published, 0))
    except StoreError as exc:
        raise ModelFormatError(f"{files.address(path)} cannot be read: {exc}") from exc


def _saved_in(files: _Files, path: str, saved: str, name: str, depth: int) -> Iterator[tuple[str, str]]:
    """Walk through a saved pipeline; metadata is read as JSON, and classes that it names are not imported."""
    metadata = _metadata(files, path)
    if metadata.get("class") == saved:
        try:
            yield f"{path}/{name}", metadata["hvdspark"]["files"][name]
        except (KeyError, TypeError) as exc:
            raise ModelFormatError(f"the metadata of {files.address(path)} names no {name}") from exc
    elif metadata.get("class") in _PIPELINES and depth < _DEEPEST:
        for stage in files.names(f"{path}/stages"):
            yield from _saved_in(files, f"{path}/stages/{stage}", saved, name, depth + 1)


def _metadata(files: _Files, path: str) -> dict[str, Any]:
    parts = [part for part in files.names(f"{path}/metadata") if part.startswith("part-")]
    try:
        found = json.loads(b"".join(files.read(f"{path}/metadata/{part}") for part in parts))
    except ValueError as exc:
        raise ModelFormatError(f"{files.address(path)}/metadata is damaged, or Spark ML did not write it") from exc
    if not isinstance(found, dict):
        raise ModelFormatError(f"{files.address(path)}/metadata holds a {type(found).__name__}, no JSON object")
    return found
