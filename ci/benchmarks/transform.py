"""Rows per second of transform on all cores, beside a bare single-threaded loop on arrays times the cores."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import data, networks
from benchmarks.comparison import Comparison, interleaved, seconds
from benchmarks.session import cores, spark_session

TARGET = 0.8
BATCH_ROWS = 4096
TITLES = {"mlp": "MLP 28-256-256-1", "convnet": "convolutional network, 28 x 28"}
# Rows of a quick run and of a full one: a second of work or more.
ROWS = {"mlp": (300_000, 2_000_000), "convnet": (20_000, 100_000)}


def measure(*, quick: bool, kind: str) -> Iterator[Comparison]:
    """Score the same rows in turns: from Spark's memory to nowhere, and from arrays to arrays."""
    import keras
    import tensorflow as tf
    from hvdspark.estimators.keras import codec
    from hvdspark.estimators.keras.model import KerasModel

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    rows, repeats = ROWS[kind][0 if quick else 1], 3 if quick else 7
    network = networks.mlp(keras) if kind == "mlp" else networks.convnet(keras)
    shape = network.input_shape[1:]
    features = np.random.default_rng(0).standard_normal((rows, int(np.prod(shape))), dtype=np.float32)
    inputs, outputs = codec.describe(network)
    model: Any = KerasModel(codec.model_to_bytes(network), inputs or (), outputs or ())
    model.setFeatureCols(["features"]).setOutputCols(["output"]).setTransformBatchSize(BATCH_ROWS)
    with tempfile.TemporaryDirectory() as name, spark_session(f"local[{cores()}]") as spark:
        folder = data.write_parquet(Path(name, "rows"), {"features": data.list_column(features)})
        df = spark.read.parquet(str(folder)).cache()
        df.count()
        scored = model.transform(df)

        def transform() -> None:
            scored.write.format("noop").mode("overwrite").save()

        def predict() -> None:
            batches = features.reshape(rows, *shape)
            for start in range(0, rows, BATCH_ROWS):
                network.predict_on_batch(batches[start : start + BATCH_ROWS])

        def rate(work: Callable[[], None], workers: int) -> Callable[[], float]:
            return lambda: workers * rows / seconds(work)

        # The first round loads the model and traces functions.
        contestants = rate(transform, 1), rate(predict, cores())
        interleaved(1, *contestants)
        ours, bare = interleaved(repeats, *contestants)
    note = f"one thread's rate times {cores()} cores"
    yield Comparison(f"transform, {TITLES[kind]} vs bare predict_on_batch", "rows/s", ours, bare, TARGET, note)
