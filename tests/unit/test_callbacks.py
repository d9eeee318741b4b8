"""Which callbacks run in a rank, and which of them take steps one by one."""

from __future__ import annotations

from typing import Any

import keras
import pytest
from hvdspark.estimators.keras.callbacks import chosen, watch_losses, watch_steps, watch_validation_steps


class Watches(keras.callbacks.Callback):  # type: ignore[misc]
    def on_batch_end(self, batch: int, logs: Any = None) -> None:
        pass


class WatchesToo(Watches):
    """Inherits the hook."""


class SavesAtSteps(keras.callbacks.ModelCheckpoint):  # type: ignore[misc]
    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        super().on_train_batch_end(batch, logs)


class TerminatesOnMore(keras.callbacks.TerminateOnNaN):  # type: ignore[misc]
    def on_batch_end(self, batch: int, logs: Any = None) -> None:
        super().on_batch_end(batch, logs)


class AtEpochs(keras.callbacks.Callback):  # type: ignore[misc]
    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        pass


def no_op(*_: Any, **__: Any) -> None:
    pass


@pytest.mark.parametrize(
    "callback",
    [
        Watches(),
        WatchesToo(),
        keras.callbacks.LambdaCallback(on_train_batch_begin=no_op),
        keras.callbacks.LambdaCallback(on_train_batch_end=no_op),
        keras.callbacks.LambdaCallback(on_batch_end=no_op),
        keras.callbacks.ModelCheckpoint("model.keras", save_freq=10),
        SavesAtSteps("model.keras"),
        TerminatesOnMore(),
    ],
)
def test_a_hook_for_steps_is_seen_wherever_it_is(callback: Any) -> None:
    assert watch_steps([AtEpochs(), callback])
    assert not watch_validation_steps([callback])


def test_a_hook_for_the_steps_of_validation_is_another() -> None:
    callback = keras.callbacks.LambdaCallback(on_test_batch_end=no_op)
    assert watch_validation_steps([callback])
    assert not watch_steps([callback])


def test_callbacks_without_such_hooks_let_a_call_take_many_steps() -> None:
    callbacks = [
        AtEpochs(),
        keras.callbacks.LambdaCallback(on_epoch_end=no_op),
        keras.callbacks.EarlyStopping(),
        keras.callbacks.History(),
        keras.callbacks.ModelCheckpoint("model.keras"),
        keras.callbacks.TerminateOnNaN(),
    ]
    assert not watch_steps(callbacks)
    assert not watch_validation_steps(callbacks)


def test_one_that_ends_the_training_on_nan_looks_at_the_loss_alone() -> None:
    assert watch_losses([AtEpochs(), keras.callbacks.TerminateOnNaN()])
    assert not watch_losses([AtEpochs(), Watches(), keras.callbacks.ModelCheckpoint("model.keras")])


@pytest.mark.parametrize("name", ["ModelCheckpoint", "OrbaxCheckpoint", "TensorBoard", "CSVLogger"])
def test_what_writes_files_runs_in_the_first_rank_alone(name: str) -> None:
    kind = getattr(keras.callbacks, name)
    # Orbax is not installed, and the class cannot be called without.
    own = type("Own", (kind,), {}).__new__(kind)
    assert chosen([own], is_first=True) == [own]
    assert chosen([own], is_first=False) == []
