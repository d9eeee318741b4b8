"""``KerasModel``: a trained Keras model as a Spark ML Transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

import cloudpickle
from hvdspark.estimators.base import HorovodModel, tensors_from_json, tensors_to_json
from hvdspark.estimators.fitting import recalled_epochs
from hvdspark.estimators.keras import codec
from hvdspark.estimators.persistence import Persistable

from hvdspark.errors import ModelFormatError, ParamError
from hvdspark.history import EpochRecord, by_metric
from hvdspark.plan import ModelTensor
from hvdspark.runs import published_model, require_run
from hvdspark.store import Store

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
    _loader = "hvdspark.estimators.keras.scorer:load_scorer"

    def __init__(
        self,
        data: bytes = b"",
        inputs: Sequence[ModelTensor] = (),
        outputs: Sequence[ModelTensor] = (),
        history: Mapping[str, list[float]] | None = None,
        custom_objects: Mapping[str, Any] | None = None,
        epochs: Sequence[EpochRecord] = (),
    ) -> None:
        super().__init__(data, inputs, outputs, history, epochs)
        self._init_attributes()
        self._custom_objects = dict(custom_objects or {})

    def getModel(self) -> keras.Model:
        """Return the Keras model, loaded anew: changing it does not change this Transformer.

        Raises
        ------
        ModelFormatError
            When Keras cannot load it, for instance for want of ``custom_objects``.
        """
        return codec.model_from_bytes(self._data, self._custom_objects, safe_mode=self._safe_mode, origin=self._origin)

    @classmethod
    def of_run(cls, store: Store, run_id: str, custom_objects: Mapping[str, Any] | None = None) -> Self:
        """Return the model that a finished run came to, with the columns that the run's record names.

        Parameters
        ----------
        store, run_id
            The run, of a ``KerasEstimator``.
        custom_objects
            The user's own classes and functions, by name.

        Returns
        -------
        KerasModel
            As ``fit`` gave it, without its phases and its rows per second.

        Raises
        ------
        ParamError
            When there is no such run, it has not finished, or its model is gone.
        ModelFormatError
            When the model cannot be loaded, or the record does not say what its columns are.
        StoreError
            When the Store cannot be read.
        """
        record, path = require_run(store, run_id), published_model(store, run_id)
        if record.state != "finished" or path is None:
            what = f"is {record.state}" if path else "has no model any more"
            raise ParamError(f"the run '{run_id}' in {store} {what}; give one that is finished", param="run_id")
        data, origin = store.read_bytes(path), store.url_of(path)
        codec.require_whole(data, origin)
        network = codec.model_from_bytes(data, custom_objects, compiled=False, origin=origin)
        inputs, outputs = codec.describe(network)
        if not outputs or not record.params.get("feature_cols"):
            raise ModelFormatError(
                f"the record of the run '{run_id}' in {store} does not say what {origin} takes and gives; save the"
                " fitted model with write().save(path), and give that path"
            )
        epochs = recalled_epochs(store, run_id)
        model = cls(data, inputs or (), outputs, by_metric(epochs), custom_objects, epochs)
        model._assign({param.name: record.params.get(param.name) for param in model.params})
        model._origin = origin
        return model

    def _log_to_mlflow(self) -> None:
        from hvdspark.estimators.keras.mlflow_model import log_model

        log_model(self)

    def _payload(self) -> bytes:
        objects = {**_registered_objects(), **self._custom_objects}
        payload: bytes = cloudpickle.dumps((self._data, objects, self._safe_mode, self._origin))
        return payload

    def _to_files(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        extra = {
            "inputs": tensors_to_json(self._inputs),
            "outputs": tensors_to_json(self._outputs),
            "history": self._history,
            "epochs": [record.to_plain() for record in self._epochs],
        }
        return extra, {_FILE: self._data}

    @classmethod
    def _from_files(cls, extra: Mapping[str, Any], files: Mapping[str, bytes]) -> Self:
        return cls(
            files[_FILE],
            tensors_from_json(extra["inputs"]),
            tensors_from_json(extra["outputs"]),
            extra["history"],
            # Models that were saved before there were any have none.
            epochs=[EpochRecord.from_plain(values) for values in extra.get("epochs", ())],
        )


def _registered_objects() -> dict[str, Any]:
    """Return what the user registered with Keras here, which the executors do not know."""
    import sys

    if "keras" not in sys.modules:
        return {}
    import keras

    return dict(keras.saving.get_custom_objects())
