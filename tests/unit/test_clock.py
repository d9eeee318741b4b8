"""How long steps wait for rows, measured inside the compiled function."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import tensorflow as tf
from hvdspark.estimators.keras.clock import StepClock

ELEMENTS = 10
SLOW_S = 0.05


def slow() -> tf.data.Dataset:
    """Make a source that needs a twentieth of a second for each element, and has none ready."""

    def elements() -> Iterator[int]:
        for number in range(ELEMENTS):
            time.sleep(SLOW_S)
            yield number

    return tf.data.Dataset.from_generator(elements, output_signature=tf.TensorSpec((), tf.int64))


def ready() -> tf.data.Dataset:
    return tf.data.Dataset.range(ELEMENTS).cache()


def run_epoch(clock: StepClock, steps: Any, source: tf.data.Dataset) -> int:
    iterator = iter(source)
    clock.start()
    total = int(steps(iterator, tf.constant(ELEMENTS)))
    clock.stop(ELEMENTS)
    return total


@pytest.fixture
def clock() -> StepClock:
    return StepClock()


@pytest.fixture
def steps(clock: StepClock) -> Any:
    """Make a compiled function that adds up elements."""

    @tf.function
    def add(iterator: Any, count: tf.Tensor) -> tf.Tensor:
        total = tf.constant(0, tf.int64)
        for _ in tf.range(count):
            total += clock.next(iterator)
        return total

    return add


def test_the_time_in_which_nothing_was_ready_is_counted(clock: StepClock, steps: Any) -> None:
    for source in (ready(), slow()):
        assert run_epoch(clock, steps, source) == sum(range(ELEMENTS))
    # The steps do nothing but wait, so that nearly all of the time is waiting.
    assert 0.8 < clock.wait_share <= 1
    assert 0 < clock.rows_per_s <= 1 / SLOW_S


def test_each_epoch_is_counted_by_itself_and_the_first_one_only_where_it_is_alone(clock: StepClock, steps: Any) -> None:
    run_epoch(clock, steps, slow())
    alone = clock.rows_per_s
    assert alone <= 1 / SLOW_S
    for _ in range(3):
        run_epoch(clock, steps, ready())
    # Three quick epochs, of which none has anything of the slow one.
    assert clock.rows_per_s > 2 * alone
