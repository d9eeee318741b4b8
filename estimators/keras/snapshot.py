"""What a rank must remember to go on training from where it is: captured from Keras, and given back to it."""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from hvdspark.estimators.keras.callbacks import is_set_up_anew

from hvdspark.errors import CorruptDatasetError
from hvdspark.worker.state import Arrays, pack, to_bits, unpack

logger = logging.getLogger(__name__)

_NOTES = "notes"
# What Keras sets anew on every callback.
_NOT_KEPT = ("_model", "model", "_params", "params", "validation_data")


class Snapshot:
    """The changing parts of a training.

    Parameters
    ----------
    model
        A compiled Keras model; it, its optimizer and its metrics are built when a state is taken or given back.
    callbacks
        The callbacks of this rank, as they begin to train: what they have changed since then is remembered.
    others
        More variables that differ between ranks, such as sums of gradients.
    """

    def __init__(self, model: Any, callbacks: Sequence[Any], others: Sequence[Any] = ()) -> None:
        self._model = model
        self._callbacks = callbacks
        self._begun = [_attributes(callback) for callback in callbacks]
        self._others = others

    @property
    def _shared(self) -> list[Any]:
        return _unique([*self._model.trainable_variables, *self._model.optimizer.variables])

    @property
    def _own(self) -> list[Any]:
        return _unique([*self._model.variables, *self._model.metrics_variables, *self._others], but=self._shared)

    def shared(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return what is the same on all ranks."""
        return {str(index): to_bits(np.asarray(variable)) for index, variable in enumerate(self._shared)}

    def own(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return what differs: statistics, metrics, generators of random numbers, and the callbacks' notes."""
        arrays = {str(index): to_bits(np.asarray(variable)) for index, variable in enumerate(self._own)}
        notes: dict[str, Any] = {
            "python": pack(random.getstate(), arrays, "random"),
            "numpy": pack(np.random.get_state(legacy=False), arrays, "random"),
            "callbacks": [
                _notes(callback, begun, arrays) for callback, begun in zip(self._callbacks, self._begun, strict=True)
            ],
        }
        arrays[_NOTES] = np.frombuffer(json.dumps(notes).encode(), np.uint8)
        return arrays

    def restore(self, shared: Arrays, own: Arrays | None) -> None:
        """Give variables and generators back what they had.

        Raises
        ------
        CorruptDatasetError
            When it is the state of another model.
        """
        _assign(self._shared, shared)
        if own is not None:
            _assign(self._own, own)
            notes = _read_notes(own)
            random.setstate(_deep_tuple(unpack(notes["python"], own)))
            np.random.set_state(unpack(notes["numpy"], own))

    def restore_callbacks(self, own: Arrays) -> None:
        """Give callbacks their notes back; after ``on_train_begin``, at which they begin anew."""
        kept: dict[str, list[Any]] = {}
        for notes in _read_notes(own)["callbacks"]:
            kept.setdefault(notes["class"], []).append(notes["values"])
        # By their classes, so that a run may go on with a callback more or less.
        for callback in self._callbacks:
            values = kept.get(type(callback).__name__)
            for name, packed in (values.pop(0) if values else {}).items():
                # What the Store holds may come from anybody: it must not say where a callback writes.
                if name not in _NOT_KEPT and not is_set_up_anew(callback, name):
                    vars(callback)[name] = unpack(packed, own)


@dataclass(frozen=True)
class _Value:
    """What an attribute was, without keeping its arrays."""

    text: str
    arrays: tuple[bytes, ...]

    @classmethod
    def of(cls, value: Any) -> _Value:
        """Take a value; raises ``TypeError`` where it cannot be kept."""
        text, arrays = _packed(value)
        return cls(text, tuple(map(_digest, arrays)))

    def is_still(self, value: Any) -> bool:
        """Whether a value is this one."""
        text, arrays = _packed(value)
        return text == self.text and tuple(map(_digest, arrays)) == self.arrays


def _packed(value: Any) -> tuple[str, list[np.ndarray[Any, Any]]]:
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    return json.dumps(pack(value, arrays, "")), list(arrays.values())


def _digest(array: np.ndarray[Any, Any]) -> bytes:
    found = hashlib.blake2b(f"{array.dtype} {array.shape}".encode(), digest_size=16)
    found.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return found.digest()


def _attributes(callback: Any) -> dict[str, _Value]:
    """Return the attributes of a callback that can be kept."""
    found = {}
    for name, value in vars(callback).items():
        try:
            found[name] = _Value.of(value)
        except TypeError as exc:
            # Functions, files and the like: the callback makes them itself.
            logger.debug("%s.%s: %s", type(callback).__name__, name, exc)
    return found


def _notes(callback: Any, begun: Mapping[str, _Value], arrays: dict[str, np.ndarray[Any, Any]]) -> Mapping[str, Any]:
    """Return what a callback has changed since the training began; how it was set up is for the user to say."""
    values = {}
    for name, value in vars(callback).items():
        try:
            if name not in _NOT_KEPT and not (name in begun and begun[name].is_still(value)):
                values[name] = pack(value, arrays, type(callback).__name__)
        except TypeError as exc:
            logger.debug("%s.%s: %s", type(callback).__name__, name, exc)
    return {"class": type(callback).__name__, "values": values}


def _read_notes(own: Arrays) -> dict[str, Any]:
    notes: dict[str, Any] = json.loads(own[_NOTES].tobytes())
    return notes


def _unique(variables: Sequence[Any], but: Sequence[Any] = ()) -> list[Any]:
    seen = {id(variable) for variable in but}
    return [v for v in variables if id(v) not in seen and not seen.add(id(v))]  # type: ignore[func-returns-value]


def _assign(variables: Sequence[Any], arrays: Arrays) -> None:
    kept = [arrays[str(index)] for index in range(len(variables)) if str(index) in arrays]
    fits = len(kept) == len(variables) and str(len(variables)) not in arrays
    if not fits or any(tuple(array.shape) != tuple(v.shape) for array, v in zip(kept, variables, strict=True)):
        raise CorruptDatasetError(
            "the checkpoint is of another model: its variables have other shapes. Give another run_id, or the model"
            " that the run began with."
        )
    for variable, array in zip(variables, kept, strict=True):
        dtype = np.asarray(variable).dtype
        variable.assign(array.view(dtype) if dtype.name == "bfloat16" else array)


def _deep_tuple(value: Any) -> Any:
    return tuple(_deep_tuple(item) for item in value) if isinstance(value, list | tuple) else value
