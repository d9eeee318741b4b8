"""Keras' callbacks in a rank: which of them run there, and whether they want to see every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

# Callbacks that write files; on other ranks than the first they would write the same files at the same time.
_WRITERS = ("ModelCheckpoint", "TensorBoard", "CSVLogger", "BackupAndRestore", "RemoteMonitor")

_BATCH_HOOKS = ("on_train_batch_begin", "on_train_batch_end", "on_batch_begin", "on_batch_end")


def chosen(callbacks: Sequence[Any], *, is_first: bool) -> list[Any]:
    """Return the callbacks that run in a rank: those that write run in the first one alone."""
    return [callback for callback in callbacks if is_first or not _is_writer(callback)]


def watch_batches(callbacks: Sequence[Any]) -> bool:
    """Whether any of them wants to be told of every step."""
    base = keras.callbacks.Callback
    return any(getattr(type(each), hook) is not getattr(base, hook) for each in callbacks for hook in _BATCH_HOOKS)


def callback_list(callbacks: Sequence[Any], model: Any, epochs: int, steps: int) -> Any:
    """Make Keras' list of callbacks, which calls each of them, for a training of so many epochs and steps."""
    return keras.callbacks.CallbackList(
        callbacks, add_history=False, add_progbar=False, model=model, epochs=epochs, steps=steps, verbose=0
    )


def _is_writer(callback: Any) -> bool:
    """Whether a callback is, or derives from, one that writes files."""
    return any(cls.__name__ in _WRITERS for cls in type(callback).__mro__)
