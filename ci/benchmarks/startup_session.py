"""A Spark program that fits twice and notes when the first step of each fit had been taken."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import keras

from benchmarks.estimator import make_estimator
from benchmarks.session import CLUSTER, spark_session


class FirstStep(keras.callbacks.Callback):  # type: ignore[misc]
    """Notes in a file of each rank when its first step has been taken."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self._folder = folder
        self._is_noted = False

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ARG002 - Keras calls it so
        """Note the time after the first step."""
        if not self._is_noted:
            Path(self._folder, str(os.getpid())).write_text(str(time.time()))
            self._is_noted = True


def main() -> None:
    """Fit and write the seconds to the first step of each fit as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument("results", type=Path)
    arguments = parser.parse_args()
    found = []
    with spark_session(CLUSTER) as spark:
        df = spark.read.parquet(str(arguments.rows))
        df.count()
        for number in range(2):
            notes = arguments.results.with_name(f"{arguments.results.name}-{number}")
            notes.mkdir()
            estimator = make_estimator(arguments.store, callbacks=[FirstStep(str(notes))])
            start = time.time()
            estimator.fit(df)
            found.append(max(float(note.read_text()) for note in notes.iterdir()) - start)
    arguments.results.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
