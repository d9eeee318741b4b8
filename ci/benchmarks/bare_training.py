"""What somebody would write without Spark: a Keras loop on arrays in memory, gradients averaged by Horovod's defaults.

Runs once per rank, under horovodrun or mpiexec; rank 0 prints the samples per second of all ranks.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import horovod.tensorflow as hvd
import keras

from benchmarks import data, networks
from benchmarks.fit_session import BATCH_ROWS

# Keras' own remedy for the cost of a call per step; without it the loop is only slower.
STEPS_PER_EXECUTION = 16


class AveragingAdam(keras.optimizers.Adam):  # type: ignore[misc]
    """Adam on gradients that are averaged over the ranks."""

    def apply(self, grads: Sequence[Any], trainable_variables: Sequence[Any] | None = None) -> None:
        """Average the gradients in one group, then apply them."""
        super().apply(hvd.grouped_allreduce(list(grads), op=hvd.Average), trainable_variables)


class EpochClock(keras.callbacks.Callback):  # type: ignore[misc]
    """Notes how long each epoch takes."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def on_epoch_begin(self, _epoch: int, logs: Any = None) -> None:  # noqa: ARG002 - Keras calls it so
        """Start."""
        self._start = time.perf_counter()

    def on_epoch_end(self, _epoch: int, logs: Any = None) -> None:  # noqa: ARG002 - Keras calls it so
        """Stop."""
        self.seconds.append(time.perf_counter() - self._start)


def main() -> None:
    """Train, and write samples per second into a file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=int, help="of all ranks")
    parser.add_argument("epochs", type=int)
    parser.add_argument("result", type=Path)
    arguments = parser.parse_args()
    hvd.init()
    keras.utils.set_random_seed(0)
    features, labels = (array[hvd.rank() :: hvd.size()] for array in data.labelled(arguments.rows))
    model = networks.mlp(keras)
    optimizer = AveragingAdam(1e-3)
    optimizer.build(model.trainable_variables)
    hvd.broadcast_variables([v.value for v in (*model.weights, *optimizer.variables)], root_rank=0)
    model.compile(optimizer, "binary_crossentropy", jit_compile=False, steps_per_execution=STEPS_PER_EXECUTION)
    clock = EpochClock()
    model.fit(features, labels, BATCH_ROWS, arguments.epochs, verbose=0, callbacks=[clock])
    if hvd.rank() == 0:
        # The first epoch traces the functions.
        arguments.result.write_text(str(arguments.rows * (arguments.epochs - 1) / sum(clock.seconds[1:])))


if __name__ == "__main__":
    main()
