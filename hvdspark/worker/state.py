"""The state of a training that is under way, so that another attempt can go on from there.

A state is a folder ``runs/<run_id>/checkpoints/state-<step>`` with a file of what all ranks have alike, and one of what
each rank has for itself. Every file ends with its own checksum, and a manifest, which is written last, lists them: a
state without one, or with a damaged file, counts for nothing, and the one before it is taken.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import posixpath
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from hvdspark.errors import CorruptDatasetError, StoreError
from hvdspark.runs import run_folder
from hvdspark.store import Store

logger = logging.getLogger(__name__)

Arrays = Mapping[str, "np.ndarray[Any, Any]"]

_MANIFEST, _SHARED = "manifest", "shared.npz"
_FOLDER = re.compile(r"state-(\d{12})")
_FILE = re.compile(r"shared\.npz|rank-\d{1,9}\.npz")
_DIGEST_BYTES = 32
_BFLOAT16 = "bfloat16"
_VERSION = 2


@dataclass(frozen=True)
class State:
    """A state, as one rank reads it.

    Parameters
    ----------
    step
        Training steps that were taken.
    info
        What else there is to know, as plain values.
    shared
        The arrays that all ranks have alike.
    own
        Those of this rank alone; ``None`` where there were fewer ranks then.
    first
        Those of the first rank.
    """

    step: int
    info: Mapping[str, Any]
    shared: Arrays
    own: Arrays | None
    first: Arrays


class StateFiles:
    """The states of a run in its Store.

    Parameters
    ----------
    store, run_id
        Where they are.
    rank, size
        This rank and how many they are.
    keep
        How many are kept.
    """

    def __init__(self, store: Store, run_id: str, rank: int, size: int, keep: int = 2) -> None:
        self._store = store
        self._folder = posixpath.join(run_folder(run_id), "checkpoints")
        self._rank = rank
        self._size = size
        self._keep = keep

    def write_own(self, step: int, arrays: Arrays) -> None:
        """Write what this rank has for itself; raises :class:`StoreError` when it cannot."""
        self._write(self._place(step, _own_name(self._rank)), _to_npz(arrays))

    def publish(self, step: int, arrays: Arrays, info: Mapping[str, Any], spared: int = -1) -> None:
        """Make a state whole, on rank 0 and once all ranks have written their own, and remove those that are too many.

        Parameters
        ----------
        step
            Training steps that were taken.
        arrays
            What all ranks have alike.
        info
            Plain values.
        spared
            The step of a state that stays in any case.

        Raises
        ------
        StoreError
            When it cannot be written; earlier states are there still. Those that cannot be removed are only logged.
        """
        self._write(self._place(step, _SHARED), _to_npz(arrays))
        files = [_SHARED, *(_own_name(rank) for rank in range(self._size))]
        manifest = {"version": _VERSION, "step": step, "files": files, "info": dict(info)}
        self._write(self._place(step, _MANIFEST), json.dumps(manifest).encode())
        try:
            self._remove_old(step, spared)
        except StoreError as exc:
            # Who is told that this failed would give up the state that is whole now.
            logger.warning("cannot look for checkpoints that are too many: %s", exc)

    def discard(self, step: int) -> None:
        """Remove what there is of a state that could not be written; raises :class:`StoreError` when it cannot."""
        self._store.delete(self._place(step))

    def latest(self, fits: Callable[[int, Mapping[str, Any]], bool] = lambda *_: True) -> int | None:
        """Return the step of the last state that is whole and fits.

        Parameters
        ----------
        fits
            Says by a state's step and info whether it can be gone on from.

        Raises
        ------
        StoreError
            When one cannot be read: it may well be whole, and all that was trained since the one before would be lost.
        """
        for step in reversed(self._steps()):
            try:
                manifest = self._manifest(step)
                if not fits(step, manifest["info"]):
                    continue
                for name in manifest["files"]:
                    self._arrays(self._place(step, name))
            except CorruptDatasetError as exc:
                logger.warning("the checkpoint of step %d is passed over: %s", step, exc)
                continue
            except StoreError as exc:
                raise StoreError(
                    f"{exc}. It belongs to the last checkpoint, and an older one is not taken in its place: try again"
                    f" when it can be read. If it never will be, remove {self._store.url_of(self._place(step))}",
                    url=exc.url,
                ) from exc
            return step
        return None

    def load(self, step: int) -> State:
        """Read a state; raises :class:`CorruptDatasetError` when it is not whole, ``StoreError`` out of reach."""
        manifest = self._manifest(step)
        own = _own_name(self._rank)
        return State(
            step,
            manifest["info"],
            self._arrays(self._place(step, _SHARED)),
            self._arrays(self._place(step, own)) if own in manifest["files"] else None,
            self._arrays(self._place(step, _own_name(0))),
        )

    def clear(self, but: int = -1) -> None:
        """Remove all states, but for that of one step."""
        for step in self._steps():
            if step != but:
                self._store.delete(self._place(step))

    def _remove_old(self, step: int, spared: int) -> None:
        """Remove the states before a step that are too many; those that cannot be removed stay."""
        before = [found for found in self._steps() if found < step]
        whole = [found for found in before if self._store.exists(self._place(found, _MANIFEST))]
        for old in set(before) - set(whole[max(0, len(whole) - self._keep + 1) :]) - {spared}:
            try:
                self._store.delete(self._place(old))
            except StoreError as exc:
                logger.warning("the checkpoint of step %d is too many, and stays: %s", old, exc)

    def _steps(self) -> list[int]:
        """List the steps of all states, whole or not."""
        found = [_FOLDER.fullmatch(name) for name in self._store.list(self._folder)]
        return sorted(int(match[1]) for match in found if match)

    def _place(self, step: int, *parts: str) -> str:
        return posixpath.join(self._folder, f"state-{step:012d}", *parts)

    def _manifest(self, step: int) -> dict[str, Any]:
        place = self._place(step, _MANIFEST)
        try:
            manifest = json.loads(self._read(place))
        except ValueError as exc:
            raise CorruptDatasetError(f"{self._store.url_of(place)} holds no JSON: {exc}") from exc
        if not isinstance(manifest, dict) or (manifest.get("version"), manifest.get("step")) != (_VERSION, step):
            raise CorruptDatasetError(f"{self._store.url_of(place)} is of another version or step")
        files, info = manifest.get("files"), manifest.get("info")
        if not isinstance(files, list) or not isinstance(info, dict) or not all(map(_is_a_name, files)):
            raise CorruptDatasetError(f"{self._store.url_of(place)} does not say what is in its folder")
        return manifest

    def _arrays(self, place: str) -> dict[str, np.ndarray[Any, Any]]:
        data = self._read(place)
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as found:
                return {name: found[name] for name in found.files}
        except (ValueError, TypeError, AttributeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as exc:
            raise CorruptDatasetError(f"{self._store.url_of(place)} holds no arrays: {exc}") from exc

    def _write(self, place: str, data: bytes) -> None:
        self._store.publish_bytes(data + _digest(data), place)

    def _read(self, place: str) -> bytes:
        """Read what :meth:`_write` wrote; raises :class:`CorruptDatasetError` when it is absent or damaged."""
        content = self._store.find_bytes(place)
        if content is None:
            raise CorruptDatasetError(f"there is no {self._store.url_of(place)}")
        data, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
        if _digest(data) != digest:
            raise CorruptDatasetError(f"{self._store.url_of(place)} is damaged: its checksum does not fit")
        return data


def _to_npz(arrays: Arrays) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def _is_a_name(value: Any) -> bool:
    return isinstance(value, str) and _FILE.fullmatch(value) is not None


def _own_name(rank: int) -> str:
    return f"rank-{rank}.npz"


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()


def to_bits(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the array in a type that NumPy's files know: bfloat16 becomes the integers of the same bits."""
    return array.view(np.uint16) if array.dtype.name == _BFLOAT16 else array


def pack(value: Any, arrays: dict[str, np.ndarray[Any, Any]], name: str) -> Any:
    """Turn a value of plain types and arrays into what JSON holds, with the arrays aside.

    Parameters
    ----------
    value
        Numbers, texts, ``None``, arrays, and lists, tuples and dictionaries of these.
    arrays
        Gets the arrays, under names that begin with ``name``.
    name
        Where the value belongs.

    Raises
    ------
    TypeError
        When there is anything else in it.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray) and (value.dtype.kind in "biufc" or value.dtype.name == _BFLOAT16):
        key = f"{name}.{len(arrays)}"
        arrays[key] = to_bits(value)
        return {_BFLOAT16 if value.dtype.name == _BFLOAT16 else "array": key}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [pack(item, arrays, name) for item in value]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: pack(item, arrays, name) for key, item in value.items()}}
    raise TypeError(f"{type(value).__name__} cannot be kept in a checkpoint")


def unpack(packed: Any, arrays: Arrays) -> Any:
    """Return the value that :func:`pack` was given."""
    if not isinstance(packed, dict):
        return packed
    ((kind, content),) = packed.items()
    if kind == "array":
        return arrays[content]
    if kind == _BFLOAT16:
        return arrays[content].view(kind)  # known to NumPy where TensorFlow was imported
    if kind == "dict":
        return {key: unpack(item, arrays) for key, item in content.items()}
    items = [unpack(item, arrays) for item in content]
    return tuple(items) if kind == "tuple" else items
