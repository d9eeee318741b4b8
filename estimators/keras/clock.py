"""How fast the training steps are, and how long they wait for rows."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import tensorflow as tf


class StepClock:
    """Times epochs; the first one, in which functions are traced, counts only when there is no other."""

    def __init__(self) -> None:
        self._waited_s = tf.Variable(0.0, dtype=tf.float64, trainable=False)
        self._epochs: list[tuple[int, float, float]] = []
        self._started = 0.0

    def next(self, iterator: Iterator[Any]) -> Any:
        """Return the iterator's next element, and measure how long that takes; works within a compiled function."""
        began = tf.timestamp()
        with tf.control_dependencies([began]):
            found = next(iterator)
        with tf.control_dependencies(tf.nest.flatten(found, expand_composites=True)):
            ended = tf.timestamp()
        self._waited_s.assign_add(ended - began)
        # Nothing may use what has come before the clock was read: of all that is ready then, TensorFlow's only thread
        # could take the clock last.
        with tf.control_dependencies([ended]):
            return tf.nest.map_structure(tf.identity, found, expand_composites=True)

    def start(self) -> None:
        """Begin an epoch."""
        self._waited_s.assign(0.0)
        self._started = time.perf_counter()

    def stop(self, rows: int) -> None:
        """End an epoch in whose steps all ranks together had so many rows."""
        self._epochs.append((rows, time.perf_counter() - self._started, float(self._waited_s)))

    @property
    def rows_per_s(self) -> float:
        """Rows of all ranks per second."""
        rows, seconds, _ = self._sums()
        return rows / seconds

    @property
    def wait_share(self) -> float:
        """Share of the time that this rank's steps waited for rows, from 0 to 1."""
        _, seconds, waited_s = self._sums()
        return waited_s / seconds

    def _sums(self) -> tuple[int, float, float]:
        rows, seconds, waited_s = zip(*(self._epochs[1:] or self._epochs), strict=True)
        return sum(rows), max(sum(seconds), 1e-9), sum(waited_s)
