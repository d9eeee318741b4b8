"""What the jobs of these tests name in their configuration; it lies beside it, and is not importable otherwise."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import keras
from pyspark.ml.feature import StandardScaler, VectorAssembler


def stages() -> list[Any]:
    return [
        VectorAssembler(inputCols=["a", "b", "c"], outputCol="numbers"),
        StandardScaler(inputCol="numbers", outputCol="scaled", withMean=True),
    ]


def network(units: int) -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((3,)),
            keras.layers.Dense(units, activation="tanh"),
            keras.layers.Dropout(0.1),
            keras.layers.Dense(1),
        ]
    )


class Hold(keras.callbacks.Callback):
    """Holds rank 0 at the end of the second epoch, once: until somebody kills it."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        mark = Path(os.environ["JOB_MARK"])
        if epoch == 2 and os.environ["HOROVOD_RANK"] == "0" and not mark.exists():
            mark.touch()
            time.sleep(600)


def hold() -> list[Any]:
    return [Hold()]
