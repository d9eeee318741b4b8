"""Scores batches with a Keras model, in an executor's Python worker."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from typing import Any

import cloudpickle
import numpy as np

from hvdspark.estimators.keras import lean  # isort: skip  # noqa: F401 - before Keras
import keras
import tensorflow as tf
from hvdspark.estimators.keras import codec, devices
from pyspark import TaskContext

from hvdspark.data.blocks import Block
from hvdspark.launch import gpus


class _KerasScorer:
    """Calls a Keras model on NumPy batches, through one compiled function for any number of rows."""

    def __init__(self, model: keras.Model) -> None:
        self._structure = getattr(model, "input", None)
        self._call = tf.function(lambda inputs: model(inputs, training=False), reduce_retracing=True)

    def __call__(self, inputs: Sequence[Block]) -> list[Block]:
        tensors: Any = [tf.constant(values) for values in inputs]
        if self._structure is not None and not hasattr(self._structure, "shape"):
            tensors = keras.tree.pack_sequence_as(self._structure, tensors)
        elif len(tensors) == 1:
            tensors = tensors[0]
        return [np.asarray(output) for output in keras.tree.flatten(self._call(tensors))]


def load_scorer(payload: bytes) -> _KerasScorer:
    """Make the scorer in an executor's Python worker.

    Parameters
    ----------
    payload
        What the driver's ``KerasModel`` packed; it came through Spark's own channel.
    """
    # Spark runs one such worker per core; each with a thread per core would fight the others.
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    except RuntimeError:
        pass  # TensorFlow is running already in this worker, with the threads it has
    choose_device()
    data, custom_objects, safe_mode, origin = cloudpickle.loads(payload)
    model = codec.model_from_bytes(data, custom_objects, safe_mode=safe_mode, compiled=False, origin=origin)
    return _KerasScorer(model)


def choose_device() -> None:
    """Have this worker compute on the GPU that Spark gave its task, or, where it gives none, on one of the host's.

    Several workers can come to use one: each takes of its memory no more than it needs.
    """
    task = TaskContext.get()
    given = gpus.addresses_of(task.resources()) if task is not None else ()
    gpus.see(given)
    visible = devices.visible_gpus()
    if not visible:
        return
    with contextlib.suppress(RuntimeError):  # TensorFlow is running already in this worker, on the device it has
        devices.use(visible[task.partitionId() % len(visible) if task is not None and not given else 0])
