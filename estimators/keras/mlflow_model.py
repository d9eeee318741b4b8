"""A trained Keras model as a model of MLflow's, in the run that is active."""

from __future__ import annotations

import importlib.metadata
import logging
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvdspark.errors import ModelFormatError
from hvdspark.plan import ModelTensor

if TYPE_CHECKING:
    from hvdspark.estimators.keras.model import KerasModel

logger = logging.getLogger(__name__)

_NAME = "model"
_REQUIRED = ("keras", "tensorflow", "tensorflow-cpu", "numpy")


def log_model(model: KerasModel) -> None:
    """Log a model, so that ``mlflow.keras.load_model`` loads it; where Keras cannot load it here, its file alone."""
    import mlflow

    try:
        network = model.getModel()
    except ModelFormatError as exc:
        logger.warning("MLflow has the model's file alone, not a model that it loads: %s", exc)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.keras"
            file.write_bytes(model._data)
            mlflow.log_artifact(str(file))
        return
    with warnings.catch_warnings():
        # It is about a type hint of MLflow's own.
        warnings.filterwarnings("ignore", message=".*Any type hint is inferred")
        import mlflow.keras

        mlflow.keras.log_model(
            network,
            name=_NAME,
            signature=_signature(model._inputs, model._outputs),
            # Given, because MLflow would find them out by loading the model in another process.
            pip_requirements=_requirements(),
        )


def _signature(inputs: Sequence[ModelTensor], outputs: Sequence[ModelTensor]) -> Any:
    """Describe inputs and outputs; ``None`` where NumPy lacks a type."""
    from mlflow.models import ModelSignature
    from mlflow.types import Schema

    try:
        return ModelSignature(Schema(_specs(inputs)), Schema(_specs(outputs)))
    except TypeError:
        return None


def _specs(tensors: Sequence[ModelTensor]) -> list[Any]:
    import numpy as np
    from mlflow.types import TensorSpec

    named = len(tensors) > 1  # MLflow takes a single tensor without a name
    return [
        TensorSpec(
            np.dtype(tensor.dtype),
            (-1, *(-1 if axis is None else axis for axis in tensor.shape)),
            tensor.name if named else None,
        )
        for tensor in tensors
    ]


def _requirements() -> list[str]:
    found = []
    for name in _REQUIRED:
        try:
            found.append(f"{name}=={importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
