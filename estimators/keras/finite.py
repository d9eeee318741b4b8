"""What is done when gradients are no numbers, or infinite.

Averaged gradients are the same on all ranks, and so is what every rank makes of them: it takes no word between them to
leave a step out. Only where a step is bad do ranks look whose own gradients it was.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdspark.errors import NonFiniteLossError
from hvdspark.worker.session import Session

logger = logging.getLogger(__name__)

# Gradients of fewer values are looked at together: a call of a kernel costs more than they do.
_SMALL_VALUES = 4096

_REMEDY = (
    "Lower the learning rate, clip gradients (clipnorm= of the optimizer), or look for such values among the rows;"
    " on_nan='skip' leaves such steps out, on_nan='stop' ends with the model before the first of them"
)


class FiniteGuard:
    """Watches over the updates of one rank.

    Parameters
    ----------
    policy
        ``"fail"`` raises an error, ``"stop"`` ends the training before the step, ``"skip"`` leaves the step out.
    session
        The Horovod session.
    optimizer
        Whose updates they are; that of mixed precision meets infinite gradients by design, and leaves them out itself.
    """

    def __init__(self, policy: str, session: Session, optimizer: Any) -> None:
        self.policy = policy
        self._session = session
        self._looks = not isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        self._index: tf.Tensor | None = None
        self._ended = False
        self._missing: list[int] = []
        with tf.device("CPU:0"):
            # A bit for every step since the last look: whether it was bad, and whether this rank's own gradients were.
            self._bad = tf.Variable(tf.zeros(2, tf.int64), trainable=False)
            self._skipped = tf.Variable(0, trainable=False, dtype=tf.int64)

    @property
    def variables(self) -> list[tf.Variable]:
        """What is to be remembered within an epoch, whatever the policy."""
        return [self._skipped]

    @property
    def undoes(self) -> bool:
        """Whether a bad step is to leave no trace."""
        return self._looks and self.policy != "fail"

    def begin(self, index: tf.Tensor) -> None:
        """Say which of the steps since the last look is traced, of 62 at most."""
        self._index = index

    def update(self, own: Sequence[Any], averaged: Sequence[Any], apply: Callable[[], None]) -> None:
        """Apply averaged gradients, or note that they are not finite.

        Parameters
        ----------
        own
            What this rank gave to the average.
        averaged
            The average over the ranks.
        apply
            Changes the weights.
        """
        if not self._looks or not averaged:
            apply()
        elif self.policy == "fail":
            # The weights may go to ruin then: they are never kept.
            tf.cond(_sum_is_finite(averaged), _nothing, lambda: self._note_if_bad(own, averaged))
            apply()
        else:
            good = tf.cond(_sum_is_finite(averaged), _nothing, lambda: _are_finite(averaged))
            if self.policy == "stop":
                good = tf.logical_and(good, tf.equal(self._bad.read_value()[0], 0))
            tf.cond(good, lambda: _done(apply), lambda: self._note(own))

    def is_bad(self) -> tf.Tensor:
        """Whether the step that is traced was left out."""
        return tf.not_equal(tf.bitwise.bitwise_and(self._bad.read_value()[0], self._bit()), 0)

    def _bit(self) -> tf.Tensor:
        return tf.bitwise.left_shift(tf.constant(1, tf.int64), tf.cast(self._index, tf.int64))

    def _note_if_bad(self, own: Sequence[Any], averaged: Sequence[Any]) -> tf.Tensor:
        return tf.cond(_are_finite(averaged), _nothing, lambda: self._note(own))

    def _note(self, own: Sequence[Any]) -> tf.Tensor:
        bit = self._bit()
        own_bit = tf.where(_are_finite(own), tf.zeros_like(bit), bit)
        self._bad.assign(tf.bitwise.bitwise_or(self._bad.read_value(), tf.stack([bit, own_bit])))
        return tf.constant(True)

    def begin_epoch(self, *, anew: bool) -> None:
        """Begin to count; ``anew`` unless the training goes on within the epoch."""
        self._missing = []
        if anew:
            self._skipped.assign(0)

    @property
    def ended(self) -> bool:
        """Whether the training is to end here."""
        return self._ended

    def look(self, epoch: int, step: int, steps: int) -> None:
        """Act on what the steps since the last look met; all ranks look after the same step, as they may act together.

        Parameters
        ----------
        epoch, step
            Where these steps began, counted from zero.
        steps
            Steps of an epoch.

        Raises
        ------
        NonFiniteLossError
            Where bad steps are to end the fit.
        """
        bad, own = map(int, self._bad.numpy())
        if not bad:
            return
        self._bad.assign(tf.zeros_like(self._bad))
        found = [step + index for index in range(bad.bit_length()) if bad >> index & 1]
        first = found[0] - step
        where = f"epoch {epoch + 1}, step {found[0] + 1} of {steps}"
        if self.policy == "fail":
            self._fail("gradient", where, epoch, found[0], own=bool(own >> first & 1))
        if self.policy == "stop":
            self._end(f"{where}: gradients are not finite; the training ends with the model before this step")
            self._missing = found[:1]
            return
        self._missing += found
        self._skipped.assign_add(len(found))

    def end_epoch(self, epoch: int, steps: int, logs: Mapping[str, float], own_loss: float) -> dict[str, float]:
        """Look at what an epoch came to; returns what its logs get besides.

        Parameters
        ----------
        epoch, steps
            Which it was, counted from zero, and how many steps it has.
        logs
            Its metrics, the same on all ranks.
        own_loss
            The loss over the rows of this rank.

        Raises
        ------
        NonFiniteLossError
            Where a loss that is not finite is to end the fit.
        """
        where = f"epoch {epoch + 1}"
        if not math.isfinite(logs.get("loss", 0.0)):
            if self.policy == "fail":
                self._fail("loss", where, epoch, steps - 1, own=not math.isfinite(own_loss))
            text = f"{where}: the loss is {logs['loss']}, though gradients are finite or mixed precision left them out"
            if self.policy == "stop":
                self._end(f"{text}; the training ends")
            else:
                self._warn(text)
        if not math.isfinite(logs.get("val_loss", 0.0)):
            self._warn(f"{where}: val_loss is {logs['val_loss']}; look for rows of the validation that cause it")
        if self.policy != "skip":
            return {}
        skipped = int(self._skipped.numpy())
        if skipped:
            self._warn(f"{where}: {skipped} of {steps} steps were left out, because gradients were not finite")
        return {"skipped_steps": float(skipped)}

    def check_weights(self, weights: Sequence[Any], epoch: int, step: int) -> None:
        """Refuse weights that are not finite, which even finite gradients can lead to; they must never be kept.

        Raises
        ------
        NonFiniteLossError
            Whatever the policy: the weights before are no longer there.
        """
        if not bool(_are_finite([weight.value for weight in weights])):
            raise NonFiniteLossError(
                f"epoch {epoch + 1}, step {step}: the weights are not finite, though all gradients were: a step was"
                " too large. Lower the learning rate, or clip gradients (clipnorm= of the optimizer)",
                epoch=epoch,
                step=step,
                ranks=(),
            )

    def counted(self, rows: np.ndarray, apply: np.ndarray, epoch: int) -> np.ndarray:
        """Return the rows of the steps of an epoch that count.

        Parameters
        ----------
        rows, apply
            Rows of this rank by step, and whether the weights change then: a bad update takes all steps along whose
            gradients it is made of.
        epoch
            Which one, counted from zero.

        Returns
        -------
        array
            The rows by step, none for those that were left out, and up to the end of the training only.

        Raises
        ------
        NonFiniteLossError
            When the training ends before it has begun.
        """
        left = rows.astype(np.int64)
        for step in self._missing:
            start = step
            while start > 0 and not apply[start - 1]:
                start -= 1
            left[start : step + 1] = 0
            if self._ended and start == epoch == 0:
                raise NonFiniteLossError(
                    f"epoch 1, step {step + 1}: gradients are not finite from the first on, there is no model."
                    f" {_REMEDY}.",
                    epoch=epoch,
                    step=step,
                    ranks=(),
                )
            if self._ended:
                return left[:start]
        return left

    def _end(self, text: str) -> None:
        self._ended = True
        self._warn(text)

    def _warn(self, text: str) -> None:
        if self._session.is_first:
            logger.warning("%s", text)

    def _fail(self, what: str, where: str, epoch: int, step: int, *, own: bool) -> None:
        """Raise on the ranks whose own numbers are bad; the others wait for their end, as for any that fails."""
        flags = self._session.gather(float(own), "hvdspark_not_finite")
        ranks = tuple(int(rank) for rank in np.flatnonzero(flags))
        names = ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))
        text = f"{where}: the {what} of {names} is not finite"
        if not ranks:
            text = f"{where}: the average of the {what} over the ranks is not finite, though that of each rank is"
        error = NonFiniteLossError(f"{text}. {_REMEDY}.", epoch=epoch, step=step, ranks=ranks)
        self._session.raise_on(ranks, error)


def _nothing() -> tf.Tensor:
    return tf.constant(True)


def _done(act: Callable[[], Any]) -> tf.Tensor:
    act()
    return tf.constant(True)


def _values(grads: Sequence[Any]) -> list[tf.Tensor]:
    return [tf.convert_to_tensor(grad.values if isinstance(grad, tf.IndexedSlices) else grad) for grad in grads]


def _sum_is_finite(grads: Sequence[Any]) -> tf.Tensor:
    """Whether a sum of all is finite, which is so for finite values unless they are huge, and never for others."""
    sums, small = [], []
    for value in _values(grads):
        count = value.shape.num_elements()
        if count is not None and count <= _SMALL_VALUES and value.dtype == tf.float32:
            small.append(tf.reshape(value, [-1]))
        else:
            sums.append(tf.cast(tf.reduce_sum(value), tf.float32))
    if small:
        sums.append(tf.reduce_sum(tf.concat(small, 0)))
    return tf.math.is_finite(tf.add_n(sums))


def _are_finite(grads: Sequence[Any]) -> tf.Tensor:
    return tf.reduce_all(tf.stack([tf.reduce_all(tf.math.is_finite(value)) for value in _values(grads)]))


class Undo:
    """Takes back what a step did to all but the weights, where nothing of the step may stay.

    Parameters
    ----------
    model
        A compiled model whose metrics are built, where there is anything to take back.
    guard
        Says which steps were left out.
    idles
        Whether there are steps in which this rank has no rows: it computes on a filler then, to take its part in the
        allreduce.
    begins
        Says whether a step is the first whose gradients go into an update; ``None`` where every step is.
    """

    def __init__(self, model: Any, guard: FiniteGuard, *, idles: bool, begins: Callable[[], tf.Tensor] | None) -> None:
        self._guard = guard
        self._idles = idles
        self._begins = begins
        wanted = idles or guard.undoes
        self._state = [*model.non_trainable_variables, *model.metrics_variables] if wanted else []
        kept = self._state if guard.undoes and begins is not None else []
        self._kept = [tf.Variable(variable.value, trainable=False) for variable in kept]
        self._before: list[tf.Tensor] = []

    def refresh(self) -> None:
        """Take the state as it is for good: it was changed from outside of a step."""
        self._keep()

    def begin(self, index: tf.Tensor) -> None:
        """Begin to trace a step, of which this is the number since the guard's last look."""
        self._guard.begin(index)
        self._before = [tf.identity(variable.value) for variable in self._state]
        if self._kept:
            assert self._begins is not None
            tf.cond(self._begins(), lambda: _done(self._keep), _nothing)

    def end(self, rows: tf.Tensor) -> None:
        """Take back what the step did, if it had no rows or was bad."""
        if self._idles:
            before = self._before
            tf.cond(rows > 0, _nothing, lambda: _done(lambda: self._restore(before)))
        if self._guard.undoes:
            before = [variable.value() for variable in self._kept] or self._before
            tf.cond(self._guard.is_bad(), lambda: _done(lambda: self._restore(before)), _nothing)

    def _keep(self) -> None:
        for kept, variable in zip(self._kept, self._state, strict=False):
            kept.assign(variable.value)

    def _restore(self, values: Sequence[tf.Tensor]) -> None:
        for variable, value in zip(self._state, values, strict=True):
            variable.assign(value)
