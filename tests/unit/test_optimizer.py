"""Gradients are averaged over the rows of all ranks; the learning rate is scaled only while training."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from hvdspark.estimators.keras.allreduce import DENSE_TABLE_VALUES, HorovodAllreduce
from hvdspark.estimators.keras.optimizer import GradientReducer, LearningRateScale, StepRows


class Ranks:
    """Stands for Horovod on one of several ranks: what the other ranks send is given."""

    Average = "average"
    Compression = SimpleNamespace(none="as it is", fp16="half")

    def __init__(self, *others: Sequence[Any]) -> None:
        self.others = others
        self.sent: list[list[Any]] = []
        self.options: list[Any] = []

    def size(self) -> int:
        return 1 + len(self.others)

    def grouped_allreduce(self, grads: Sequence[Any], **options: Any) -> list[Any]:
        self.sent.append(list(grads))
        self.options.append(options)
        return [
            tf.add_n([grad, *[other[index] for other in self.others]]) / self.size() for index, grad in enumerate(grads)
        ]

    def allreduce(self, grad: Any, **_options: Any) -> Any:
        """Reduce one sparse gradient; what the other ranks send has no rows."""
        return tf.IndexedSlices(grad.values / self.size(), grad.indices, grad.dense_shape)


class Recorder:
    """Stands for an optimizer: notes what it is to apply."""

    def __init__(self) -> None:
        self.applied: list[list[Any]] = []

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        self.applied.append([np.array(grad) if not isinstance(grad, tf.IndexedSlices) else grad for grad in grads])


def step(rows: float, total: float, apply: bool = True) -> StepRows:
    return StepRows(tf.constant(float(rows)), tf.constant(float(total)), tf.constant(apply))


def attached(
    hvd: Any, variables: Sequence[Any], compression: str = "none", **given: Any
) -> tuple[GradientReducer, Recorder]:
    reducer, optimizer = GradientReducer(HorovodAllreduce(hvd, compression), **given), Recorder()
    reducer.attach(optimizer, variables)
    return reducer, optimizer


VARIABLES = [tf.Variable([0.0, 0.0]), tf.Variable(0.0)]


def test_every_row_counts_the_same_whichever_rank_has_it() -> None:
    own, other = [np.array([1.0, 2.0], "f4"), np.float32(3)], [np.array([5.0, -6.0], "f4"), np.float32(7)]
    # The other rank has 1 of the 4 rows and so sends its mean gradient times 2 / 4.
    hvd = Ranks([grad * np.float32(0.5) for grad in other])
    reducer, optimizer = attached(hvd, VARIABLES)
    reducer.begin(step(3, 4))
    optimizer.apply([tf.constant(grad) for grad in own], VARIABLES)
    for found, mine, theirs in zip(optimizer.applied[0], own, other, strict=True):
        assert found == pytest.approx((3 * mine + theirs) / 4)
    assert len(hvd.sent) == 1, "one collective per step"


def test_a_rank_without_rows_sends_zeros_even_where_its_gradient_is_no_number() -> None:
    hvd = Ranks([np.array([2.0, 4.0], "f4"), np.float32(6)])
    reducer, optimizer = attached(hvd, VARIABLES)
    reducer.begin(step(0, 5))
    optimizer.apply([tf.constant([np.nan, np.inf]), tf.constant(np.nan)], VARIABLES)
    assert [np.array(grad).tolist() for grad in hvd.sent[0]] == [[0.0, 0.0], 0.0]
    assert [found.tolist() for found in optimizer.applied[0]] == [[1.0, 2.0], 3.0]


def test_variables_without_a_gradient_are_left_out() -> None:
    reducer, optimizer = attached(Ranks([np.float32(1)]), VARIABLES)
    reducer.begin(step(1, 2))
    optimizer.apply([None, tf.constant(1.0)], VARIABLES)
    assert [found.tolist() for found in optimizer.applied[0]] == [1.0]


def test_one_rank_sends_nothing() -> None:
    hvd = Ranks()
    reducer, optimizer = attached(hvd, VARIABLES)
    reducer.begin(step(4, 4))
    optimizer.apply([tf.constant([1.0, 2.0]), tf.constant(3.0)], VARIABLES)
    assert [found.tolist() for found in optimizer.applied[0]] == [[1.0, 2.0], 3.0]
    assert hvd.sent == []


@pytest.mark.parametrize(("given", "expected"), [("none", "as it is"), ("fp16", "half")])
def test_the_compression_is_handed_on(given: str, expected: str) -> None:
    hvd = Ranks([np.float32(1)])
    reducer, optimizer = attached(hvd, VARIABLES[1:], compression=given)
    reducer.begin(step(1, 2))
    optimizer.apply([tf.constant(1.0)], VARIABLES[1:])
    assert hvd.options[0]["compression"] == expected


def test_several_passes_are_averaged_by_their_rows_and_sent_once() -> None:
    hvd = Ranks()
    reducer, optimizer = attached(hvd, VARIABLES[1:], passes_per_step=3)

    def pass_through(grad: float, rows: int, apply: bool) -> None:
        reducer.begin(step(rows, rows, apply))
        optimizer.apply([tf.constant(grad)], VARIABLES[1:])

    for first, last in ((1.0, 4.0), (10.0, 40.0)):
        applied = len(optimizer.applied)
        pass_through(first, 2, False)
        assert len(optimizer.applied) == applied
        pass_through(last, 1, True)
        assert optimizer.applied[-1] == pytest.approx([(2 * first + last) / 3])


def slices(rows: int, width: int) -> tf.IndexedSlices:
    return tf.IndexedSlices(tf.ones((2, width)), tf.constant([0, rows - 1]), tf.constant([rows, width]))


def test_the_gradient_of_a_small_table_travels_dense_and_that_of_a_large_one_sparse() -> None:
    hvd = Ranks([tf.zeros((10, 4))])
    reducer, optimizer = attached(hvd, VARIABLES)
    reducer.begin(step(1, 2))
    optimizer.apply([slices(10, 4), slices(DENSE_TABLE_VALUES // 4 + 1, 4)], VARIABLES)
    kinds = [isinstance(grad, tf.IndexedSlices) for grad in optimizer.applied[0]]
    assert kinds == [False, True]
    assert optimizer.applied[0][0].sum() == pytest.approx(4.0)


def test_sparse_gradients_are_not_grouped_with_dense_ones_whose_shapes_horovod_would_give_them() -> None:
    hvd = Ranks([tf.zeros(2)])
    reducer, optimizer = attached(hvd, VARIABLES)
    reducer.begin(step(1, 2))
    optimizer.apply([tf.ones(2), slices(DENSE_TABLE_VALUES, 4)], VARIABLES)
    assert not any(isinstance(grad, tf.IndexedSlices) for sent in hvd.sent for grad in sent)
    dense, sparse = optimizer.applied[0]
    assert dense.tolist() == [0.5, 0.5]
    assert tuple(sparse.dense_shape) == (DENSE_TABLE_VALUES, 4)
    assert sparse.values.numpy().tolist() == [[0.5] * 4] * 2


def test_a_rate_is_scaled_while_training_and_its_own_while_saving() -> None:
    optimizer = keras.optimizers.SGD(0.25)
    rate = LearningRateScale(optimizer, 2)
    assert float(optimizer.learning_rate) == 0.5
    with rate.taken_out():
        assert float(optimizer.learning_rate) == 0.25
        assert optimizer.get_config()["learning_rate"] == 0.25
    assert float(optimizer.learning_rate) == 0.5


def test_a_rate_that_a_callback_lowers_is_saved_without_the_factor_and_goes_on_as_it_is() -> None:
    optimizer = keras.optimizers.SGD(0.25)
    rate = LearningRateScale(optimizer, 4)
    optimizer.learning_rate = 0.5
    with rate.taken_out():
        assert float(optimizer.learning_rate) == 0.125
    assert float(optimizer.learning_rate) == 0.5


def test_the_rate_comes_back_where_saving_fails() -> None:
    optimizer = keras.optimizers.SGD(0.25)
    rate = LearningRateScale(optimizer, 3)
    with pytest.raises(OSError, match="full"), rate.taken_out():
        raise OSError("full")
    assert float(optimizer.learning_rate) == 0.75


def test_a_schedule_is_scaled_while_training_and_itself_while_saving() -> None:
    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 10, 0.5)
    optimizer = keras.optimizers.SGD(schedule)
    rate = LearningRateScale(optimizer, 3)
    assert float(optimizer.learning_rate) == 1.5
    with rate.taken_out():
        assert float(optimizer.learning_rate) == 0.5
        config = optimizer.get_config()["learning_rate"]
        assert config["class_name"] == "ExponentialDecay"
    optimizer.iterations.assign(10)
    assert float(optimizer.learning_rate) == 0.75


def test_the_rate_inside_of_loss_scaling_is_meant() -> None:
    inner = keras.optimizers.SGD(0.25)
    optimizer = keras.optimizers.LossScaleOptimizer(inner)
    with LearningRateScale(optimizer, 2).taken_out():
        assert float(inner.learning_rate) == 0.25
    assert float(inner.learning_rate) == 0.5


def test_a_factor_of_one_changes_nothing() -> None:
    schedule = keras.optimizers.schedules.ExponentialDecay(0.5, 10, 0.5)
    optimizer = keras.optimizers.SGD(schedule)
    with LearningRateScale(optimizer, 1).taken_out():
        assert optimizer._learning_rate is schedule
    assert optimizer._learning_rate is schedule
