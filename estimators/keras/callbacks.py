"""Keras' callbacks in a rank: which of them run there, and which steps they want to see."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import keras

# Callbacks that write files; on other ranks than the first they would write the same files at the same time.
_WRITERS = ("ModelCheckpoint", "OrbaxCheckpoint", "TensorBoard", "CSVLogger", "BackupAndRestore", "RemoteMonitor")

# Those whose hook for steps does nothing when they save at the end of epochs.
_SAVE_HOOKS = tuple(
    getattr(keras.callbacks, name).on_train_batch_end
    for name in ("ModelCheckpoint", "OrbaxCheckpoint")
    if hasattr(keras.callbacks, name)  # Orbax came with a later Keras 3
)
# The loss it looks at is that of the epoch so far: once that is no number, it stays so.
_LOSS_HOOK = keras.callbacks.TerminateOnNaN.on_batch_end

_STEP_HOOKS = ("on_train_batch_begin", "on_train_batch_end", "on_batch_begin", "on_batch_end")
_VALIDATION_STEP_HOOKS = ("on_test_batch_begin", "on_test_batch_end")


def chosen(callbacks: Sequence[Any], *, is_first: bool) -> list[Any]:
    """Return the callbacks that run in a rank: those that write run in the first one alone."""
    return [callback for callback in callbacks if is_first or not _is_writer(callback)]


def watch_steps(callbacks: Sequence[Any]) -> bool:
    """Whether any of them wants to be told of every training step."""
    return any(_acts(each, hook) for each in callbacks for hook in _STEP_HOOKS)


def watch_losses(callbacks: Sequence[Any]) -> bool:
    """Whether any of them wants to be told of the loss within an epoch, though not after every step."""
    return any(_function(each.on_batch_end) is _LOSS_HOOK for each in callbacks)


def watch_validation_steps(callbacks: Sequence[Any]) -> bool:
    """Whether any of them wants to be told of every step of validation."""
    return any(_acts(each, hook) for each in callbacks for hook in _VALIDATION_STEP_HOOKS)


def act_at_end(callbacks: Sequence[Any]) -> bool:
    """Whether any of them does something when the training ends, such as giving the model other weights."""
    return any(_function(each.on_train_end) is not keras.callbacks.Callback.on_train_end for each in callbacks)


def is_set_up_anew(callback: Any, name: str) -> bool:
    """Whether an attribute is as the program has it, and never as a checkpoint does: where a callback writes, say."""
    if name == "min_delta":
        # Keras turns its sign when it chooses monitor_op, a function, which no checkpoint can hold.
        return vars(callback).get("monitor_op", callback) is None
    return _is_writer(callback) and isinstance(vars(callback).get(name), str | os.PathLike)


def callback_list(callbacks: Sequence[Any], model: Any, epochs: int, steps: int) -> Any:
    """Make Keras' list of callbacks, which calls each of them, for a training of so many epochs and steps."""
    return keras.callbacks.CallbackList(
        callbacks, add_history=False, add_progbar=False, model=model, epochs=epochs, steps=steps, verbose=0
    )


def _is_writer(callback: Any) -> bool:
    """Whether a callback is, or derives from, one that writes files."""
    return any(cls.__name__ in _WRITERS for cls in type(callback).__mro__)


def _acts(callback: Any, hook: str) -> bool:
    """Whether a callback does something of its own in a hook, for which it must see every step."""
    function = _function(getattr(callback, hook))
    if function in _SAVE_HOOKS:
        return bool(callback.save_freq != "epoch")
    return function not in (getattr(keras.callbacks.Callback, hook), _LOSS_HOOK)


def _function(hook: Any) -> Any:
    """Return what a hook calls: its class may define it, or the instance hold it, as LambdaCallback does."""
    return getattr(hook, "__func__", hook)
