"""Which averages count as not finite, what is left of a step that has one, and what is said about it."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hvdspark.estimators.keras.allreduce import HorovodAllreduce
from hvdspark.estimators.keras.finite import FiniteGuard, Undo
from hvdspark.estimators.keras.optimizer import GradientReducer, StepRows

from hvdspark.errors import NonFiniteLossError

ALONE = SimpleNamespace(size=lambda: 1, Average="average", Compression=SimpleNamespace(none=None))


class Session:
    """Stands for the session of the first of several ranks: what the others say is given."""

    is_first = True

    def __init__(self, *others: float) -> None:
        self.others = others

    def gather(self, value: float, name: str) -> np.ndarray:
        return np.array([value, *self.others])

    def raise_on(self, ranks: Sequence[int], error: Exception) -> None:
        raise error


def guard(policy: str, *others: float, optimizer: Any = None) -> FiniteGuard:
    return FiniteGuard(policy, Session(*others), optimizer)  # type: ignore[arg-type]


class Training:
    """One rank that adds gradients to a weight, and counts its steps in a variable beside it."""

    def __init__(self, policy: str, passes: int = 1, dtype: str = "float32") -> None:
        self.weight = tf.Variable(tf.zeros(3, dtype))
        self.steps = tf.Variable(0.0)
        self.guard = guard(policy)
        reducer = GradientReducer(HorovodAllreduce(ALONE), passes, self.guard)
        self._optimizer = SimpleNamespace(apply=lambda grads, variables: self.weight.assign_add(grads[0]))
        reducer.attach(self._optimizer, [self.weight])
        holder = SimpleNamespace(value=self.steps, assign=self.steps.assign)
        model = SimpleNamespace(non_trainable_variables=[holder], metrics_variables=[])
        self._undo = Undo(model, self.guard, idles=False, begins=reducer.begins_update if passes > 1 else None)
        self._reducer, self._passes = reducer, passes

    def step(self, grad: Any, index: tf.Tensor) -> None:
        self._reducer.begin(StepRows(tf.constant(2.0), tf.constant(2.0), (index + 1) % self._passes == 0))
        self._undo.begin(index)
        self.steps.assign_add(1.0)
        self._optimizer.apply([grad], [self.weight])
        self._undo.end(tf.constant(2.0))

    def call(self, grads: Sequence[Any]) -> None:
        @tf.function
        def steps(grads: tf.Tensor) -> None:
            for index in range(len(grads)):
                self.step(grads[index], tf.constant(index))

        steps(tf.constant(np.array(grads), self.weight.dtype))
        self.guard.look(0, 0, len(grads))

    @property
    def state(self) -> list[float]:
        return [float(self.weight[0]), float(self.steps)]


WELL = [1.0, 2.0, 3.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_step_with_one_bad_value_is_left_out(bad: float) -> None:
    training = Training("skip")
    training.call([WELL, [1.0, bad, 0.0], WELL])
    assert training.state == [2.0, 2.0]
    assert training.guard.end_epoch(0, 3, {"loss": 1.0}, 1.0) == {"skipped_steps": 1.0}


def test_infinities_that_cancel_each_other_are_bad() -> None:
    training = Training("skip")
    training.call([[math.inf, -math.inf, 0.0]])
    assert training.state == [0.0, 0.0]


@pytest.mark.parametrize(("dtype", "huge"), [("float32", 3e38), ("float16", 6e4), ("bfloat16", 3e38)])
@pytest.mark.parametrize("policy", ["skip", "fail"])
def test_values_whose_sum_alone_overflows_are_well(dtype: str, huge: float, policy: str) -> None:
    training = Training(policy, dtype=dtype)
    training.call([[huge, huge, huge]])
    assert training.state == [pytest.approx(huge, rel=1e-2), 1.0]


def test_nothing_changes_after_a_stop() -> None:
    training = Training("stop")
    training.call([WELL, [math.nan] * 3, WELL])
    assert training.state == [1.0, 1.0]
    assert training.guard.ended
    counted = training.guard.counted(np.full(3, 2.0, "f4"), np.full(3, True), 0)
    assert counted.tolist() == [2]


def test_the_steps_of_one_update_go_together() -> None:
    training = Training("skip", passes=2)
    training.call([WELL, WELL, [math.nan] * 3, WELL, WELL, WELL])
    assert training.state == [2.0, 4.0]
    counted = training.guard.counted(np.full(6, 2.0, "f4"), np.array([False, True] * 3), 0)
    assert counted.tolist() == [2, 2, 0, 0, 2, 2]


def test_a_failure_names_the_first_step_and_the_ranks() -> None:
    training = Training("fail")
    with pytest.raises(NonFiniteLossError, match=r"^epoch 1, step 2 of 4: the gradient of rank 0 is not") as caught:
        training.call([WELL, [math.nan] * 3, WELL, [math.nan] * 3])
    assert caught.value.fields == {"epoch": 0, "step": 1, "ranks": (0,)}


def test_where_only_the_average_is_bad_no_rank_is_named() -> None:
    found = guard("fail", 0.0)
    found.begin(tf.constant(2))
    found.update([tf.constant([3e38])], [tf.constant([math.inf])], lambda: None)
    with pytest.raises(NonFiniteLossError, match=r"step 8 of 9: the average of the gradient over the ranks"):
        found.look(0, 5, 9)


def test_sparse_gradients_are_looked_at() -> None:
    found = guard("skip")
    found.begin(tf.constant(0))
    sparse = tf.IndexedSlices(tf.constant([[1.0, math.nan]]), tf.constant([3]), tf.constant([9, 2]))
    found.update([sparse], [sparse], lambda: pytest.fail("it was applied"))
    assert bool(found.is_bad())


def test_loss_scaling_is_left_to_do_its_work() -> None:
    found = guard("fail", optimizer=keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()))
    applied = []
    found.begin(tf.constant(0))
    found.update([tf.constant([math.inf])], [tf.constant([math.inf])], lambda: applied.append(1))
    found.look(0, 0, 1)
    assert applied == [1]
    assert not found.undoes


def test_a_loss_that_is_no_number_is_told_by_the_policy(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with pytest.raises(NonFiniteLossError, match=r"^epoch 3: the loss of ranks 0, 1 is not finite"):
        guard("fail", 1.0).end_epoch(2, 9, {"loss": math.nan}, math.nan)
    stopping = guard("stop")
    stopping.end_epoch(2, 9, {"loss": math.inf}, math.inf)
    assert stopping.ended
    assert "epoch 3: the loss is inf" in caplog.text
    assert guard("skip").end_epoch(2, 9, {"loss": math.nan}, math.nan) == {"skipped_steps": 0.0}


def test_a_validation_that_is_no_number_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    assert guard("fail").end_epoch(0, 9, {"loss": 1.0, "val_loss": math.nan}, 1.0) == {}
    assert "epoch 1: val_loss is nan" in caplog.text


@pytest.mark.parametrize("policy", ["fail", "stop", "skip"])
def test_weights_that_a_finite_step_ruined_are_refused(policy: str) -> None:
    weight = SimpleNamespace(value=tf.constant([1.0, math.inf]))
    with pytest.raises(NonFiniteLossError, match=r"^epoch 1, step 4: the weights are not finite"):
        guard(policy).check_weights([weight], 0, 4)
