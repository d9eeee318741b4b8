"""Keras' callbacks in a rank: which of them run there, and whether they want to see every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

# Callbacks that write files; on other ranks than the first they would write the same files at the same time.
_WRITERS = ("ModelCheckpoint", "OrbaxCheckpoint", "TensorBoard", "CSVLogger", "BackupAndRestore", "RemoteMonitor")

_STEP_HOOKS = ("on_train_batch_begin", "on_train_batch_end", "on_batch_begin", "on_batch_end")
_VALIDATION_STEP_HOOKS = ("on_test_batch_begin", "on_test_batch_end")


def chosen(callbacks: Sequence[Any], *, is_first: bool) -> list[Any]:
    """Return the callbacks that run in a rank: those that write run in the first one alone."""
    return [callback for callback in callbacks if is_first or not _is_writer(callback)]


def watch_steps(callbacks: Sequence[Any]) -> bool:
    """Whether any of them wants to be told of every training step."""
    return any(_acts(each, hook) for each in callbacks for hook in _STEP_HOOKS)


def watch_validation_steps(callbacks: Sequence[Any]) -> bool:
    """Whether any of them wants to be told of every step of validation."""
    return any(_acts(each, hook) for each in callbacks for hook in _VALIDATION_STEP_HOOKS)


def callback_list(callbacks: Sequence[Any], model: Any, epochs: int, steps: int) -> Any:
    """Make Keras' list of callbacks, which calls each of them, for a training of so many epochs and steps."""
    return keras.callbacks.CallbackList(
        callbacks, add_history=False, add_progbar=False, model=model, epochs=epochs, steps=steps, verbose=0
    )


def _is_writer(callback: Any) -> bool:
    """Whether a callback is, or derives from, one that writes files."""
    return any(cls.__name__ in _WRITERS for cls in type(callback).__mro__)


def _acts(callback: Any, hook: str) -> bool:
    """Whether a callback has a hook of its own: its class may define it, or the instance hold it, as LambdaCallback."""
    found = getattr(callback, hook)
    return getattr(found, "__func__", found) is not getattr(keras.callbacks.Callback, hook)
