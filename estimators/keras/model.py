"""``KerasModel``: a trained Keras model as a Spark ML Transformer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import cloudpickle
import numpy as np
from hvdspark.estimators.base import HorovodModel, tensors_from_json, tensors_to_json
from hvdspark.estimators.keras import codec
from hvdspark.estimators.persistence import Persistable

from hvdspark.data.blocks import Block
from hvdspark.plan import ModelTensor

if TYPE_CHECKING:
    import keras

_FILE = f"model{codec.SUFFIX}"


class KerasModel(HorovodModel, Persistable):
    """A trained Keras model; :class:`KerasEstimator` makes it.

    ``transform`` keeps all columns of its input and appends one per model output, ``<label>__output`` unless
    ``setOutputCols`` names them otherwise.
    """

    _attributes: ClassVar[Mapping[str, Any]] = {"custom_objects": {}, "safe_mode": True}
    _custom_objects: Mapping[str, Any]
    _safe_mode: bool
    _loader = "hvdspark.estimators.keras.model:load_scorer"

    def __init__(
        self,
        data: bytes = b"",
        inputs: Sequence[ModelTensor] = (),
        outputs: Sequence[ModelTensor] = (),
        history: Mapping[str, list[float]] | None = None,
        custom_objects: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(data, inputs, outputs, history)
        self._init_attributes()
        self._custom_objects = dict(custom_objects or {})

    def getModel(self) -> keras.Model:
        """Return the Keras model, loaded anew: changing it does not change this Transformer.

        Raises
        ------
        ModelFormatError
            When Keras cannot load it, for instance for want of ``custom_objects``.
        """
        return codec.model_from_bytes(self._data, self._custom_objects, safe_mode=self._safe_mode)

    def _payload(self) -> bytes:
        objects = {**_registered_objects(), **self._custom_objects}
        payload: bytes = cloudpickle.dumps((self._data, objects, self._safe_mode))
        return payload

    def _to_files(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        extra = {
            "inputs": tensors_to_json(self._inputs),
            "outputs": tensors_to_json(self._outputs),
            "history": self._history,
        }
        return extra, {_FILE: self._data}

    @classmethod
    def _from_files(cls, extra: Mapping[str, Any], files: Mapping[str, bytes]) -> Self:
        return cls(
            files[_FILE], tensors_from_json(extra["inputs"]), tensors_from_json(extra["outputs"]), extra["history"]
        )


def _registered_objects() -> dict[str, Any]:
    """Return what the user registered with Keras here, which the executors do not know."""
    import sys

    if "keras" not in sys.modules:
        return {}
    import keras

    return dict(keras.saving.get_custom_objects())


class _KerasScorer:
    """Calls a Keras model on NumPy batches, through one compiled function for any number of rows."""

    def __init__(self, model: keras.Model) -> None:
        import keras
        import tensorflow as tf

        self._structure = getattr(model, "input", None)
        self._flatten = keras.tree.flatten
        self._pack = keras.tree.pack_sequence_as
        self._call = tf.function(lambda inputs: model(inputs, training=False), reduce_retracing=True)
        self._tensor = tf.constant

    def __call__(self, inputs: Sequence[Block]) -> list[Block]:
        tensors: Any = [self._tensor(values) for values in inputs]
        if self._structure is not None and not hasattr(self._structure, "shape"):
            tensors = self._pack(self._structure, tensors)
        elif len(tensors) == 1:
            tensors = tensors[0]
        return [np.asarray(output) for output in self._flatten(self._call(tensors))]


def load_scorer(payload: bytes) -> _KerasScorer:
    """Make the scorer in an executor's Python worker.

    Parameters
    ----------
    payload
        What the driver's ``KerasModel`` packed; it came through Spark's own channel.
    """
    import tensorflow as tf

    # Spark runs one such worker per core; each with a thread per core would fight the others.
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    except RuntimeError:
        pass  # TensorFlow is running already in this worker, with the threads it has
    data, custom_objects, safe_mode = cloudpickle.loads(payload)
    return _KerasScorer(codec.model_from_bytes(data, custom_objects, safe_mode=safe_mode, compiled=False))
