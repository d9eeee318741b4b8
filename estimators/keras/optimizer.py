"""Gradient averaging inside the compiled training step.

The user's optimizer keeps its class, so that it saves and loads like any other; only its ``apply`` is led through the
reducer. That is the one place through which every Keras 3 training step goes, also a user's own ``train_step`` and
mixed precision's loss scaling (whose test for finite gradients must see the same gradients on every rank).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf
from hvdspark.estimators.keras.agreement import Agreement
from hvdspark.estimators.keras.allreduce import DENSE_TABLE_VALUES, Allreduce
from hvdspark.estimators.keras.finite import FiniteGuard


@dataclass
class StepRows:
    """What the gradients of the step being traced stand for; scalars of the graph.

    Parameters
    ----------
    rows
        Rows of this rank; zero when it has none and computes on a filler.
    total
        Rows of all ranks together.
    apply
        Whether the weights change now, or the gradients are kept for a later step.
    """

    rows: tf.Tensor
    total: tf.Tensor
    apply: tf.Tensor


class GradientReducer:
    """Averages gradients over the rows of all ranks, by one allreduce per update.

    Parameters
    ----------
    allreduce
        Averages over the ranks.
    passes_per_step
        Batches whose gradients are averaged locally before they are sent.
    guard
        Decides on averages that are not finite; without one they are applied like any.
    agreement
        Is told what is averaged, to compare it with that of other ranks.
    """

    def __init__(
        self,
        allreduce: Allreduce,
        passes_per_step: int = 1,
        guard: FiniteGuard | None = None,
        agreement: Agreement | None = None,
    ) -> None:
        self._allreduce = allreduce
        self._passes = passes_per_step
        self._guard = guard
        self._agreement = agreement
        self._step: StepRows | None = None
        self._updates = 0
        self._sums: list[tf.Variable] = []
        self._seen: tf.Variable | None = None

    @property
    def variables(self) -> list[tf.Variable]:
        """What this rank has added up and not sent yet."""
        return self._sums + ([] if self._seen is None else [self._seen])

    def begin(self, step: StepRows) -> None:
        """Say what the gradients that come next stand for; called while the step is traced."""
        self._step = step
        self._updates = 0

    def attach(self, optimizer: Any, variables: Sequence[Any]) -> None:
        """Lead the optimizer's ``apply`` through this reducer.

        Parameters
        ----------
        optimizer
            A Keras optimizer, built for the variables.
        variables
            The model's trainable variables.
        """
        if self._passes > 1:
            self._sums = [tf.Variable(tf.zeros(v.shape, v.dtype), trainable=False) for v in variables]
            self._seen = tf.Variable(0.0, trainable=False)
        update = optimizer.apply

        def apply(grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
            chosen = list(variables if trainable_variables is None else trainable_variables)
            present = [(grad, var) for grad, var in zip(grads, chosen, strict=True) if grad is not None]
            if self._passes == 1:
                self._average(present, update)
            else:
                self._accumulate(present, chosen, update)

        optimizer.apply = apply

    def begins_update(self) -> tf.Tensor:
        """Whether none of the gradients of the next update are there yet."""
        assert self._seen is not None
        return tf.equal(self._seen, 0.0)

    def _average(self, present: Sequence[tuple[Any, Any]], update: Any) -> None:
        """Weight each rank's mean gradient by its rows, so that the result is the mean over all rows."""
        assert self._step is not None, "begin() was not called for this step"
        share = float(self._allreduce.size) * self._step.rows / self._step.total
        self._send([_scale(_dense_if_small(grad), share) for grad, _ in present], [var for _, var in present], update)

    def _accumulate(self, present: Sequence[tuple[Any, Any]], variables: Sequence[Any], update: Any) -> None:
        """Add up the gradients of several steps and send their mean when the last of them is through."""
        assert self._step is not None, "begin() was not called for this step"
        assert self._seen is not None
        step, seen = self._step, self._seen
        places = {id(var): index for index, var in enumerate(variables)}
        sums = [self._sums[places[id(var)]] for _, var in present]
        for total, (grad, _) in zip(sums, present, strict=True):
            total.assign_add(_scale(tf.convert_to_tensor(grad), step.rows))
        seen.assign_add(step.total)

        def send() -> tf.Tensor:
            share = float(self._allreduce.size) / seen
            own = [_scale(tf.convert_to_tensor(total), share) for total in sums]
            self._send(own, [var for _, var in present], update)
            for total in sums:
                total.assign(tf.zeros_like(total))
            seen.assign(0.0)
            return tf.constant(True)

        tf.cond(step.apply, send, lambda: tf.constant(False))

    def _send(self, grads: list[Any], variables: Sequence[Any], update: Any) -> None:
        # A user's own step may update more than once.
        self._updates += 1
        if self._agreement is not None:
            self._agreement.note(grads)
        averaged = self._allreduce.average(grads, f"hvdspark_gradients_{self._updates}")
        if self._guard is None:
            update(averaged, variables)
        else:
            self._guard.update(grads, averaged, lambda: update(averaged, variables))


def _scale(grad: Any, factor: tf.Tensor) -> Any:
    """Multiply; a factor of zero gives zero even for NaN, which a filler's gradient may be."""
    if isinstance(grad, tf.IndexedSlices):
        return tf.IndexedSlices(_scale(grad.values, factor), grad.indices, grad.dense_shape)
    return tf.math.multiply_no_nan(grad, tf.cast(factor, grad.dtype))


def _dense_if_small(grad: Any) -> Any:
    if not isinstance(grad, tf.IndexedSlices):
        return grad
    shape = tf.get_static_value(grad.dense_shape) if grad.dense_shape is not None else None
    values = 1
    for axis in shape if shape is not None else ():
        values *= int(axis)
    return tf.convert_to_tensor(grad) if shape is not None and values <= DENSE_TABLE_VALUES else grad


def changes_at_end(optimizer: Any) -> bool:
    """Whether an optimizer has other weights for the end of a training, such as averages of those it went through."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    finalize = getattr(inner.finalize_variable_values, "__func__", None)
    return bool(inner.use_ema) or finalize is not keras.optimizers.Optimizer.finalize_variable_values


class LearningRateScale:
    """Multiplies an optimizer's learning rate while it trains, and takes the factor out while it is saved.

    Parameters
    ----------
    optimizer
        A Keras optimizer; for mixed precision's wrapper its inner one is meant.
    factor
        Usually the number of ranks: with so many times more rows per step, steps may be longer.
    """

    def __init__(self, optimizer: Any, factor: float) -> None:
        self._optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        self._factor = factor
        # Keras has no public way to exchange a schedule, and forbids setting the rate while there is one.
        self._schedule = self._optimizer._learning_rate
        self._is_schedule = isinstance(self._schedule, keras.optimizers.schedules.LearningRateSchedule)
        self._multiply(factor)

    @property
    def factor(self) -> float:
        """What the rate is multiplied by."""
        return self._factor

    def rescale(self, before: float) -> None:
        """Take a rate over that was multiplied by another factor, in a training on more or fewer ranks."""
        if not self._is_schedule and before != self._factor:
            self._optimizer.learning_rate = float(self._optimizer.learning_rate) * self._factor / before

    @contextlib.contextmanager
    def taken_out(self) -> Iterator[None]:
        """Give the optimizer its own rate back for the time of a block."""
        if self._factor == 1:
            yield
            return
        before = None if self._is_schedule else float(self._optimizer.learning_rate)
        self._multiply(1 / self._factor)
        try:
            yield
        finally:
            if before is None:
                self._multiply(self._factor)
            else:
                self._optimizer.learning_rate = before

    def _multiply(self, factor: float) -> None:
        if factor == 1:
            return
        if not self._is_schedule:
            self._optimizer.learning_rate = float(self._optimizer.learning_rate) * factor
        elif factor == self._factor:
            self._optimizer._learning_rate = _ScaledSchedule(self._schedule, factor)
        else:
            self._optimizer._learning_rate = self._schedule


class _ScaledSchedule(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    """Another schedule, times a factor; lives only while a rank trains."""

    def __init__(self, schedule: Any, factor: float) -> None:
        super().__init__()
        self._inner = schedule
        self._factor = factor

    def __call__(self, step: Any) -> Any:
        return self._inner(step) * self._factor

    def get_config(self) -> dict[str, Any]:
        """Refuse: a scaled schedule must never be saved (see :meth:`LearningRateScale.taken_out`)."""
        raise NotImplementedError("save the model within LearningRateScale.taken_out()")
