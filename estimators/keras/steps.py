"""The steps of a rank as compiled functions, each of which takes many steps of a chunk at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tensorflow as tf
from hvdspark.estimators.keras.agreement import Agreement
from hvdspark.estimators.keras.batches import Batches
from hvdspark.estimators.keras.feeding import Portion
from hvdspark.estimators.keras.finite import FiniteGuard, Undo
from hvdspark.estimators.keras.optimizer import GradientReducer, StepRows

# Makes of a batch's tensors what a model's step takes.
Pack = Callable[..., Any]

# Traced as it is, as Keras does it: AutoGraph's translation of all that is called takes seconds.
_plain = tf.autograph.experimental.do_not_convert


class TrainSteps:
    """The training steps.

    Parameters
    ----------
    model
        A compiled model whose optimizer is led through the reducer.
    batches, pack
        Its rows, and how they are given to it.
    reducer, guard
        What averages the gradients, and what is done when they are not finite.
    agreement
        Compares what the ranks are about to send.
    idles
        Whether there are steps in which this rank has no rows.
    accumulates
        Whether gradients of several steps go into an update.
    """

    def __init__(
        self,
        model: Any,
        batches: Batches,
        pack: Pack,
        reducer: GradientReducer,
        guard: FiniteGuard,
        agreement: Agreement,
        *,
        idles: bool,
        accumulates: bool,
    ) -> None:
        if idles or guard.undoes:
            build_metrics(model, batches, pack)
        begins = reducer.begins_update if accumulates else None
        self._undo = undo = Undo(model, guard, idles=idles, begins=begins)
        self._agreement = agreement
        self._is_traced = model.run_eagerly

        @_plain  # type: ignore[untyped-decorator]
        def step(chunk: Any, place: tf.Tensor, index: tf.Tensor, facts: StepRows) -> None:
            reducer.begin(facts)
            undo.begin(index)
            model.train_step(pack(*batches.batch(chunk, place)))
            undo.end(facts.rows)

        def steps(
            chunk: Any, start: tf.Tensor, number: tf.Tensor, rows: tf.Tensor, total: tf.Tensor, apply: tf.Tensor
        ) -> None:
            for index in tf.range(tf.size(rows)):
                step(chunk, start + index, number + index, StepRows(rows[index], total[index], apply[index]))

        signature = (
            batches.signature,
            *(tf.TensorSpec((), tf.int32),) * 2,
            *(tf.TensorSpec((None,), dtype) for dtype in (tf.float32, tf.float32, tf.bool)),
        )
        self._steps = _compiled(model, steps, signature)

    def refresh(self) -> None:
        """Take the model's state as it is for good: it was changed from outside of a step."""
        self._undo.refresh()

    def take(self, portion: Portion, number: int, rows: Any, total: Any, apply: Any) -> None:
        """Take the steps of a portion.

        Parameters
        ----------
        portion
            Where they lie.
        number
            How many were taken since the guard has looked.
        rows, total, apply
            By step: the rows of this rank, those of all ranks, and whether the weights change.
        """
        if not self._is_traced:
            # Not earlier: callbacks may change the model before its first step.
            self._steps.get_concrete_function()
            self._agreement.check_noted()
            self._is_traced = True
        self._steps(portion.chunk, portion.start, number, rows, total, apply)


class ValidationSteps:
    """The steps of validation; parameters as for :class:`TrainSteps`."""

    def __init__(self, model: Any, batches: Batches, pack: Pack) -> None:
        @_plain  # type: ignore[untyped-decorator]
        def step(chunk: Any, place: tf.Tensor) -> None:
            model.test_step(pack(*batches.batch(chunk, place)))

        def steps(chunk: Any, start: tf.Tensor, count: tf.Tensor) -> None:
            for index in tf.range(count):
                step(chunk, start + index)

        self._steps = _compiled(model, steps, (batches.signature, *(tf.TensorSpec((), tf.int32),) * 2))

    def take(self, portion: Portion) -> None:
        """Take the steps of a portion."""
        self._steps(portion.chunk, portion.start, portion.count)


def build_metrics(model: Any, batches: Batches, pack: Pack) -> None:
    """Make the metrics' variables, which Keras does at the first step, before that step is traced."""
    model.test_step(pack(*(tf.constant(tensor) for tensor in batches.sample())))
    model.reset_metrics()


def _compiled(model: Any, steps: Callable[..., None], signature: Any) -> Any:
    """Compile for chunks of any number of rows; a model that runs eagerly stays as it is."""
    return steps if model.run_eagerly else tf.function(steps, input_signature=signature, jit_compile=False)
