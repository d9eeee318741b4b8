"""What the estimators of all frameworks share: the way of the data through ``fit`` and ``transform``.

::

    parameters -> check the schema -> materialize -> shards -> barrier stage -> model file in the Store -> Model
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from hvdspark.estimators.fitting import Fit
from hvdspark.estimators.outputs import planned_outputs
from hvdspark.estimators.params import EstimatorParams, ModelParams
from hvdspark.estimators.sources import FedSource, FrameSource, ParquetSource
from pyspark.ml import Estimator, Model
from pyspark.sql.types import StructType

from hvdspark.data import schema
from hvdspark.errors import ModelFormatError, ParamError
from hvdspark.history import EpochRecord, Table, epoch_table
from hvdspark.launch.options import LaunchOptions
from hvdspark.plan import BatchSpec, CacheMode, ColumnSpec, ModelTensor, TrainResult
from hvdspark.predict import OutputColumn, ScorePlan, score, scored_schema
from hvdspark.recording import Recording
from hvdspark.run import active_session
from hvdspark.runs import log_folder
from hvdspark.store import Store
from hvdspark.warmstart import WarmStart
from hvdspark.worker.checkpoint import BestOf
from hvdspark.worker.job import Job

if TYPE_CHECKING:
    from pyspark import Broadcast, SparkContext
    from pyspark.sql import DataFrame

logger = logging.getLogger(__name__)

Tensors = Sequence[ModelTensor] | None


class HorovodEstimator(Estimator, EstimatorParams, abc.ABC):  # type: ignore[type-arg]
    """Fits a model on a DataFrame with Horovod on barrier tasks; frameworks fill in the abstract methods."""

    _attributes: ClassVar[Mapping[str, Any]] = {"store": None, "model": None}
    _kind: ClassVar[str] = "run"
    _trainer: ClassVar[str]
    _suffix: ClassVar[str] = ""
    _saved: ClassVar[str] = ""
    _store: Store | None
    _model: Any

    @abc.abstractmethod
    def _describe(self) -> tuple[Tensors, Tensors]:
        """Return the model's inputs and outputs, ``None`` for what it does not state."""

    @abc.abstractmethod
    def _check(self) -> None:
        """Check what the framework needs to be given, before any Spark job."""

    @abc.abstractmethod
    def _job(self) -> Job:
        """Return what every rank is to do; its first argument, the :class:`FitPlan`, is put before the others."""

    def _start_from(self, start: WarmStart) -> None:  # noqa: ARG002 - for frameworks that can
        """Take the weights to begin with, in place of the model's own; raises ``ParamError`` where they do not fit."""
        raise ParamError(f"{type(self).__name__} has no warm_start", param="warm_start")

    @abc.abstractmethod
    def _describe_trained(self, data: bytes) -> tuple[Tensors, Tensors]:
        """Return the inputs and outputs of a trained model's file."""

    @abc.abstractmethod
    def _make_model(self, data: bytes, result: TrainResult) -> HorovodModel:
        """Wrap the trained model's file."""

    def _best_of(self) -> BestOf | None:
        """Return which epoch's model is kept; ``None`` for the last one's."""
        return None

    def _attribute_facts(self) -> dict[str, Any]:
        """Describe what is no parameter by JSON values, for the run's record; secrets have no place there."""
        store = self._store
        if store is None:
            return {}
        return {"store": store.url, "storage_options": sorted(store.ref().storage_options)}

    @property
    def outputs(self) -> Tensors:
        """What the model gives, output by output; ``None`` where only its first rows will tell."""
        return self._describe()[1]

    def fit_on_parquet(
        self, path: str | os.PathLike[str], validation_path: str | os.PathLike[str] | None = None
    ) -> HorovodModel:
        """Fit on Parquet files where they lie: nothing is written but the run.

        Parameters
        ----------
        path
            A file or folder, or an address that fsspec and Spark know, which the driver and all executors reach:
            Parquet of any program (Spark's vectors and images too, but no partition folders), or a dataset that an
            earlier fit left in a Store. The latter reads faster, and has its validation rows with it.
        validation_path
            Rows to validate on, likewise; ``validation`` cannot hold any out.

        Returns
        -------
        HorovodModel
            As of ``fit``.

        Raises
        ------
        ConfigError, DataError
            As ``fit``. Nulls that the files' footers do not count, and rows of different lengths, fail in the ranks.
        """
        places = (os.fspath(path), None if validation_path is None else os.fspath(validation_path))
        return Fit(self._converted(), ParquetSource(active_session(), *places)).run()

    def _fit(self, dataset: DataFrame, job: Recording | None = None) -> HorovodModel:
        """Fit; ``job`` is the record of the job that this is a part of, and closes it."""
        estimator = self._converted()
        if estimator._value("data") == "direct":
            return Fit(estimator, FedSource(dataset), job).run()
        source = FrameSource(dataset, estimator._required("store"), keep=estimator._value("keep_dataset"))
        return Fit(estimator, source, job).run()

    def _batch(self, frame_schema: StructType) -> tuple[tuple[ColumnSpec, ...], BatchSpec]:
        inputs, outputs = self._describe()
        return schema.check_columns(
            frame_schema,
            feature_cols=self._required("feature_cols"),
            label_cols=self._required("label_cols"),
            sample_weight_col=self._value("sample_weight_col"),
            inputs=inputs,
            outputs=outputs,
            label_shapes=self._value("label_shapes"),
            missing=self._missing(),
            sparse=self._value("compress_sparse_cols"),
        )

    def _required(self, name: str) -> Any:
        value = getattr(self, f"_{name}") if name in self._attributes else self._value(name)
        if value is None or (isinstance(value, list) and not value):
            raise ParamError(f"{type(self).__name__} needs {name}; it was not given", param=name)
        return value

    def _cache(self) -> CacheMode:
        """Return where decoded rows are kept; raises ``ParamError`` where two parameters say different things."""
        mode: CacheMode = self._value("cache")
        if not self._value("inmemory_cache_all"):
            return mode
        if mode not in ("auto", "memory"):
            raise ParamError(
                f"inmemory_cache_all=True means cache='memory', but cache={mode!r} was given; give one of them",
                param="cache",
            )
        return "memory"

    def _launch_options(self, run_id: str, store: Store) -> LaunchOptions:
        env = dict(self._value("backend_env") or {})
        if not self._value("use_gpu"):
            env.setdefault("CUDA_VISIBLE_DEVICES", "")
        return LaunchOptions(
            controller=self._value("controller"),
            nics=tuple(self._value("nics") or ()),
            rdma=self._value("rdma"),
            env=env,
            start_timeout_s=self._value("start_timeout"),
            stall_timeout_s=self._value("stall_timeout_s"),
            slots_timeout_s=self._value("slots_timeout_s"),
            store=store.ref(),
            logs=log_folder(run_id),
            preload=Job(self._trainer).modules,
            warm_pool=self._value("warm_pool"),
            allow_insecure_transport=self._value("allow_insecure_transport"),
        )


class HorovodModel(Model, ModelParams, abc.ABC):
    """A trained model as a Spark ML Transformer; frameworks fill in the abstract methods.

    Parameters
    ----------
    data
        The model's file.
    inputs, outputs
        What the model takes and gives.
    history
        Per metric the value of each epoch.
    epochs
        What else is known of each epoch.
    """

    _loader: ClassVar[str]

    def __init__(
        self,
        data: bytes = b"",
        inputs: Sequence[ModelTensor] = (),
        outputs: Sequence[ModelTensor] = (),
        history: Mapping[str, list[float]] | None = None,
        epochs: Sequence[EpochRecord] = (),
    ) -> None:
        super().__init__()
        self._setDefault(transform_batch_size=4096)
        self._data = data
        self._inputs = tuple(inputs)
        self._outputs = tuple(outputs)
        self._history = {name: list(values) for name, values in (history or {}).items()}
        self._epochs = tuple(epochs)
        self._phases: dict[str, float] = {}
        self._rows_per_s = 0.0
        self._data_wait_share = 0.0
        self._sent: tuple[str, str, Broadcast[bytes]] | None = None

    @abc.abstractmethod
    def _payload(self) -> bytes:
        """Return what the loader makes the scorer of."""

    @abc.abstractmethod
    def _log_to_mlflow(self) -> None:
        """Log the model to the run of MLflow's that is active."""

    def getHistory(self) -> dict[str, list[float]]:
        """Return the training history: per metric the value of each epoch, over the rows of all ranks."""
        return {name: list(values) for name, values in self._history.items()}

    @property
    def epochs(self) -> tuple[EpochRecord, ...]:
        """Each epoch's metrics, and where its time went, by rank; saved with the model."""
        return self._epochs

    def summary(self) -> Table:
        """Return a table of the epochs: metrics, rows per second, and where the time went.

        For the times that the ranks waited for rows, averaged gradients and computed it has the least and the most of
        them; the slowest rank is the one for which the others waited. A console or a notebook shows the table as it is.
        """
        return epoch_table(self._epochs)

    @property
    def phases(self) -> dict[str, float]:
        """Seconds that each phase of the fit took; empty for a model that was loaded."""
        return dict(self._phases)

    @property
    def rows_per_s(self) -> float:
        """Training rows per second over all ranks, without validation and the first epoch; zero after loading."""
        return self._rows_per_s

    @property
    def data_wait_share(self) -> float:
        """Share of the training steps' time that they waited for rows, from 0 to 1, in the rank that waited longest.

        Counted as :attr:`rows_per_s` is: without validation and the first epoch; zero after loading.
        """
        return self._data_wait_share

    @property
    def outputs(self) -> tuple[ModelTensor, ...]:
        """What the model gives, output by output."""
        return self._outputs

    @property
    def output_columns(self) -> tuple[OutputColumn, ...]:
        """The columns that ``transform`` appends."""
        return planned_outputs(self, self._outputs)

    def transformSchema(self, frame_schema: StructType) -> StructType:
        """Return the schema that :meth:`transform` gives for an input schema; raises ``SchemaError`` as it does."""
        self._score_plan(frame_schema, "")
        return scored_schema(frame_schema, self.output_columns)

    def _transform(self, dataset: DataFrame) -> DataFrame:
        payload = self._payload()
        key = hashlib.sha256(payload).hexdigest()
        plan = self._score_plan(dataset.schema, key)
        return score(dataset, plan, self._broadcast(dataset.sparkSession.sparkContext, key, payload))

    def _broadcast(self, context: SparkContext, key: str, payload: bytes) -> Broadcast[bytes]:
        """Send the payload to the executors, or take what an earlier call sent."""
        if self._sent is None or self._sent[:2] != (key, context.applicationId):
            self._sent = (key, context.applicationId, context.broadcast(payload))
        return self._sent[2]

    def _score_plan(self, frame_schema: StructType, key: str) -> ScorePlan:
        if not self._outputs:
            raise ModelFormatError(f"this {type(self).__name__} holds no model; make one with fit() or load()")
        features = self._value("feature_cols")
        names = [name for entry in features for name in ([entry] if isinstance(entry, str) else entry)]
        columns, batch = schema.check_columns(
            frame_schema,
            feature_cols=features,
            inputs=self._inputs or None,
            missing=self._missing().only(names),
        )
        return ScorePlan(
            columns=columns,
            features=batch.features,
            outputs=self.output_columns,
            batch_rows=self._value("transform_batch_size"),
            loader=self._loader,
            key=key,
        )


def tensors_to_json(tensors: Sequence[ModelTensor]) -> list[dict[str, Any]]:
    """Describe tensors by JSON values."""
    return [dataclasses.asdict(tensor) for tensor in tensors]


def tensors_from_json(values: Sequence[Mapping[str, Any]]) -> tuple[ModelTensor, ...]:
    """Read what :func:`tensors_to_json` made."""
    return tuple(ModelTensor(value["name"], tuple(value["shape"]), value["dtype"]) for value in values)
