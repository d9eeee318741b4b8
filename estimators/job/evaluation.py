"""Models compared on the same rows, by Keras' own loss and metrics.

Each task adds up what Keras' metrics keep of its rows; the driver adds up the tasks' sums, as the ranks do for the
history of a fit. So a metric such as AUC or a root mean squared error is that of all rows, not an average of averages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import cloudpickle
import numpy as np
import pyarrow as pa
from hvdspark.estimators.keras import codec
from hvdspark.estimators.keras.model import KerasModel
from pyspark.ml import PipelineModel
from pyspark.ml.base import Transformer
from pyspark.sql import DataFrame
from pyspark.sql.types import StructType

from hvdspark.data import schema
from hvdspark.data.arrays import fill_tensor, to_block
from hvdspark.errors import EmptyDatasetError, ModelFormatError, ParamError
from hvdspark.plan import BatchSpec, ColumnSpec, ModelTensor, TensorSpec

if TYPE_CHECKING:
    import keras

# As the metrics of the rows that a fit validates on are called.
PREFIX = "val_"

_SUMS = "rows long, sums array<double>"


@dataclass(frozen=True)
class Yardstick:
    """What models are compared by.

    Parameters
    ----------
    compiling
        Loss, loss weights and metrics, as ``keras.Model.compile`` takes them.
    outputs
        What the models give; a loss by output goes by these names.
    custom_objects
        The user's own classes and functions.
    sample_weight_col
        Column with each row's weight in the loss.
    label_shapes
        As for the estimator.
    label_cols
        What the models must have learnt to predict; empty for whatever they have.
    """

    compiling: Mapping[str, Any]
    outputs: tuple[ModelTensor, ...]
    custom_objects: Mapping[str, Any] = field(default_factory=dict)
    sample_weight_col: str | None = None
    label_shapes: Sequence[Sequence[int]] | None = None
    label_cols: tuple[str, ...] = ()

    def names(self, frame_schema: StructType, label_cols: Sequence[str]) -> list[str]:
        """Return the names of the metrics, for labels of a schema; raises ``SchemaError`` where these do not fit."""
        _, batch = schema.check_columns(
            frame_schema,
            feature_cols=[],
            label_cols=label_cols,
            outputs=self.outputs,
            label_shapes=self.label_shapes,
        )
        meter = _Meter(self._payload(batch))
        return [PREFIX + name for name in meter.results([meter.sums()])]

    def measure(self, model: Transformer, rows: DataFrame) -> dict[str, float]:
        """Score rows by a Keras model or a pipeline that ends in one, and evaluate what comes out.

        Parameters
        ----------
        model
            The fitted pipeline, or the model alone.
        rows
            With the labels, or what the pipeline makes them of.

        Returns
        -------
        dict of str to float
            The loss and all metrics, their names beginning with ``val_``.

        Raises
        ------
        EmptyDatasetError
            When there are no rows.
        SchemaError, ParamError, ModelFormatError
            When there are no labels, or the pipeline has no Keras model with such outputs.
        """
        scored, columns, batch = self.planned(model, rows)
        payload, read = self._payload(batch), _reader(columns, batch)

        def add_up(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
            meter = _Meter(payload)
            for part in batches:
                if part.num_rows:
                    meter.add(*read(part))
            yield pa.RecordBatch.from_pydict(
                {"rows": pa.array([meter.rows], pa.int64()), "sums": pa.array([meter.sums()], pa.list_(pa.float64()))}
            )

        parts = scored.select(*[f"`{name}`" for name in batch.columns]).mapInArrow(add_up, _SUMS).collect()
        if not sum(part["rows"] for part in parts):
            raise EmptyDatasetError("there are no rows to evaluate the model on: check 'evaluation'")
        results = _Meter(payload).results([part["sums"] for part in parts])
        return {PREFIX + name: value for name, value in results.items()}

    def planned(self, model: Transformer, rows: DataFrame) -> tuple[DataFrame, tuple[ColumnSpec, ...], BatchSpec]:
        """Return the scored rows, lazily, and how predictions and labels are read of them; errors as :meth:`measure`.

        No job runs, so that one can find out before a training whether a model can be measured after it.
        """
        last = keras_stage(model)
        labels = last.label_columns
        if self.label_cols and labels != self.label_cols:
            raise ParamError(
                f"it predicts {', '.join(labels) or 'no label'}, and label_cols are {', '.join(self.label_cols)}",
                param="label_cols",
            )
        scored = model.transform(rows)
        given = [ModelTensor(column.name, column.shape, "float32") for column in last.output_columns]
        columns, batch = schema.check_columns(
            scored.schema,
            feature_cols=[tensor.name for tensor in given],
            label_cols=labels,
            sample_weight_col=self.sample_weight_col,
            inputs=given,
            outputs=self.outputs,
            label_shapes=self.label_shapes,
            missing=last.missing.only(labels),
        )
        return scored, columns, batch

    def _payload(self, batch: BatchSpec) -> bytes:
        """Describe the yardstick by plain values, to make it anew in a task."""
        config = {name: codec.to_config(value) for name, value in self.compiling.items()}
        functions = codec.functions_in([self.compiling["loss"], self.compiling["metrics"]])
        shapes = [tensor.shape or tensor.preferred_shape for tensor in batch.labels]
        payload: bytes = cloudpickle.dumps(
            (config, {**functions, **self.custom_objects}, list(zip(self.outputs, shapes, strict=True)))
        )
        return payload


def keras_stage(model: Transformer) -> KerasModel:
    """Return the last Keras model among a pipeline's stages; raises :class:`ModelFormatError` where there is none."""
    stages = model.stages if isinstance(model, PipelineModel) else [model]
    for stage in reversed(stages):
        if isinstance(stage, PipelineModel):
            return keras_stage(stage)
        if isinstance(stage, KerasModel):
            return stage
    names = ", ".join(type(stage).__name__ for stage in stages) or "no stages"
    raise ModelFormatError(f"the pipeline has no KerasModel to evaluate; it has: {names}")


Tensors = list[np.ndarray[Any, Any]]


def _reader(
    columns: Sequence[ColumnSpec], batch: BatchSpec
) -> Callable[[pa.RecordBatch], tuple[Tensors, Tensors, np.ndarray[Any, Any] | None]]:
    """Return what turns a batch of scored rows into the model's outputs, the labels and the weights."""

    def read(part: pa.RecordBatch) -> tuple[Tensors, Tensors, np.ndarray[Any, Any] | None]:
        blocks = {spec.name: to_block(part.column(spec.name), spec) for spec in columns}

        def filled(tensors: Sequence[TensorSpec]) -> Tensors:
            return [np.asarray(fill_tensor(blocks, tensor)) for tensor in tensors]

        weight = None if batch.sample_weight is None else np.asarray(blocks[batch.sample_weight]).reshape(-1)
        return filled(batch.features), filled(batch.labels), weight

    return read


class _Meter:
    """Keras' loss and metrics over predictions: those of a model that gives back what it is fed."""

    rows = 0

    def __init__(self, payload: bytes) -> None:
        import keras

        config, objects, places = cloudpickle.loads(payload)
        compiling = {name: codec.from_config(value, objects) for name, value in config.items()}
        outputs = [tensor for tensor, _ in places]
        inputs = [keras.Input(tensor.shape, name=f"fed_{index}") for index, tensor in enumerate(outputs)]
        given = [keras.layers.Identity(name=tensor.name)(fed) for fed, tensor in zip(inputs, outputs, strict=True)]
        self._model = keras.Model(inputs, given)
        # Eagerly: tracing a function would take longer than all the batches of a task.
        self._model.compile(**compiling, run_eagerly=True)
        self._is_single = len(outputs) == 1
        # Keras makes the metrics' variables at the first batch, and chooses by its shapes what 'accuracy' means.
        shapes = [tuple(axis or 1 for axis in tensor.shape) for tensor in outputs]
        labels = [own or shape for (_, own), shape in zip(places, shapes, strict=True)]
        self.add([np.ones((1, *shape), "float32") for shape in shapes], [np.zeros((1, *own)) for own in labels], None)
        self._model.reset_metrics()
        self.rows = 0

    def add(self, outputs: Tensors, labels: Tensors, weights: np.ndarray[Any, Any] | None) -> None:
        """Take in a batch."""
        self._model.test_on_batch(outputs, labels[0] if self._is_single else labels, sample_weight=weights)
        self.rows += len(outputs[0])

    def sums(self) -> list[float]:
        """Return what the metrics keep, in one row."""
        return [float(value) for variable in self._variables for value in np.asarray(variable).reshape(-1)]

    def results(self, sums: Sequence[Sequence[float]]) -> dict[str, float]:
        """Return the metrics of all that was added up."""
        total, start = np.sum(np.asarray(sums, dtype=np.float64), axis=0), 0
        for variable in self._variables:
            size = int(np.prod(variable.shape))
            variable.assign(total[start : start + size].reshape(variable.shape).astype(variable.dtype))
            start += size
        values = {name: np.asarray(value) for name, value in self._model.get_metrics_result().items()}
        return {name: float(value.item()) for name, value in sorted(values.items()) if value.size == 1}

    @property
    def _variables(self) -> list[keras.Variable]:
        return [variable for metric in self._model.metrics for variable in metric.variables]
