"""Saved models as jobs name them: by an address, by an entry of an alias, or as what a run left in the Store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvdspark.estimators.job.places import spark_address
from hvdspark.estimators.keras import codec
from hvdspark.estimators.keras.model import KerasModel
from hvdspark.estimators.persistence import list_folder
from pyspark.ml import PipelineModel
from pyspark.ml.base import Transformer
from pyspark.ml.util import DefaultParamsReader
from pyspark.sql import SparkSession

from hvdspark.aliases import AliasEntry, path_in_store
from hvdspark.errors import ModelFormatError, ParamError
from hvdspark.runs import RUNS, published_model
from hvdspark.store import Store


def address_of(session: SparkSession, store: Store, entry: AliasEntry) -> str:
    """Return the address, as Spark takes it, of what an alias refers to: an entry may hold a path in the Store."""
    is_relative = path_in_store(store, entry.model) == entry.model
    return spark_address(session, store, entry.model) if is_relative else entry.model


def load_model(
    session: SparkSession, address: str, store: Store | None = None, custom_objects: Mapping[str, Any] | None = None
) -> Transformer:
    """Load a saved pipeline, a saved Keras model, or the model file of a run.

    Parameters
    ----------
    session
        By which it is read.
    address
        As Spark takes it.
    store
        In which a model file is that a run left: what else is needed is in the run's record.
    custom_objects
        The user's own classes and functions, by name.

    Raises
    ------
    ParamError
        When there is no model, or nobody knows which columns it takes.
    ModelFormatError
        When it is damaged.
    StoreError
        When the Store cannot be read.
    """
    if address.endswith(codec.SUFFIX):
        return _of_file(address, store, custom_objects)
    if "metadata" not in list_folder(session, address):
        raise ParamError(f"there is no saved model in {address}; give the address of one, or an alias", param="model")
    try:
        metadata = DefaultParamsReader.loadMetadata(address, session)
    except (ValueError, TypeError) as exc:
        raise ModelFormatError(f"{address}/metadata is damaged, or Spark ML did not write it: {exc}") from exc
    model = (KerasModel if "hvdspark" in metadata else PipelineModel).load(address)
    for stage in _stages(model):
        if isinstance(stage, KerasModel):
            stage.setCustomObjects(dict(custom_objects or {}))  # type: ignore[attr-defined] # as all setters are made
    return model


def _of_file(address: str, store: Store | None, custom_objects: Mapping[str, Any] | None) -> KerasModel:
    inside = None if store is None else path_in_store(store, address)
    folder, _, rest = (inside or "").partition("/")
    run_id = rest.partition("/")[0]
    if store is None or folder != RUNS or inside != published_model(store, run_id):
        raise ParamError(
            f"{address} is a file of Keras' own, which does not say what columns it takes: give the run's model in its"
            " Store (--store), or save a KerasModel or a pipeline with write().save(path), and give that path",
            param="model",
        )
    return KerasModel.of_run(store, run_id, custom_objects)


def _stages(model: Transformer) -> list[Transformer]:
    if not isinstance(model, PipelineModel):
        return [model]
    return [stage for part in model.stages for stage in _stages(part)]
