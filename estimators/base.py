"""What the estimators of all frameworks share: the way of the data through ``fit`` and ``transform``.

::

    parameters -> check the schema -> materialize -> shards -> barrier stage -> model file in the Store -> Model
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import logging
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar

import cloudpickle
from hvdspark.estimators.params import EstimatorParams, ModelParams
from pyspark.ml import Estimator, Model
from pyspark.sql.types import StructType

from hvdspark.data import schema
from hvdspark.data.materialize import materialize
from hvdspark.data.partitions import TRAIN, VAL, Split
from hvdspark.data.shards import plan_shards
from hvdspark.errors import ModelFormatError, ParamError
from hvdspark.launch.barrier import LaunchOptions, check_slots, count_slots, run_barrier
from hvdspark.plan import BatchSpec, ColumnSpec, FitPlan, Manifest, ModelTensor, TrainResult
from hvdspark.predict import OutputColumn, ScorePlan, output_columns, score, scored_schema
from hvdspark.store import Store
from hvdspark.worker.checkpoint import run_folder
from hvdspark.worker.job import Job

if TYPE_CHECKING:
    from pyspark import Broadcast, SparkContext
    from pyspark.sql import DataFrame, SparkSession

logger = logging.getLogger(__name__)

Tensors = Sequence[ModelTensor] | None


class HorovodEstimator(Estimator, EstimatorParams, abc.ABC):  # type: ignore[type-arg]
    """Fits a model on a DataFrame with Horovod on barrier tasks; frameworks fill in the abstract methods."""

    _attributes: ClassVar[Mapping[str, Any]] = {"store": None, "model": None}
    _kind: ClassVar[str] = "run"
    _store: Store | None
    _model: Any

    @abc.abstractmethod
    def _describe(self) -> tuple[Tensors, Tensors]:
        """Return the model's inputs and outputs, ``None`` for what it does not state."""

    @abc.abstractmethod
    def _check(self) -> None:
        """Check what the framework needs to be given, before any Spark job."""

    @abc.abstractmethod
    def _job(self, plan: FitPlan) -> Job:
        """Return what every rank is to do."""

    @abc.abstractmethod
    def _make_model(self, data: bytes, result: TrainResult) -> HorovodModel:
        """Wrap the trained model's file."""

    def _fit(self, dataset: DataFrame) -> HorovodModel:
        return _Fit(self._converted(), dataset).run()

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
        )

    def _required(self, name: str) -> Any:
        value = getattr(self, f"_{name}") if name in self._attributes else self._value(name)
        if value is None or (isinstance(value, list) and not value):
            raise ParamError(f"{type(self).__name__} needs {name}; it was not given", param=name)
        return value

    def _launch_options(self, run_id: str, store: Store) -> LaunchOptions:
        env = dict(self._value("backend_env") or {})
        if not self._value("use_gpu"):
            env.setdefault("CUDA_VISIBLE_DEVICES", "")
        return LaunchOptions(
            controller=self._value("controller"),
            nics=tuple(self._value("nics") or ()),
            env=env,
            start_timeout_s=self._value("start_timeout"),
            store=store.ref(),
            logs=f"{run_folder(run_id)}/logs",
        )


class _Fit:
    """One fit: its plan, its run folder and the time each phase took."""

    def __init__(self, estimator: HorovodEstimator, df: DataFrame) -> None:
        self._estimator = estimator
        self._df = df
        self._phases: dict[str, float] = {}
        self._run_id = estimator._value("run_id") or new_run_id(estimator._kind)

    def run(self) -> HorovodModel:
        estimator, session = self._estimator, self._df.sparkSession
        with self._timed("check"):
            store, columns, batch, num_proc = self._check(session)
        with self._timed("write"):
            dataset, manifest = materialize(self._df, columns, self._split(), store)
        try:
            plan = self._plan(store, dataset, manifest, batch, num_proc)
            self._say(
                f"{manifest.rows(TRAIN)} training and {manifest.rows(VAL)} validation rows, {num_proc} ranks,"
                f" {plan.train.steps} steps per epoch"
            )
            with self._timed("launch"):
                options = estimator._launch_options(self._run_id, store)
                payload = cloudpickle.dumps(estimator._job(plan))
                answers = run_barrier(session, num_proc, payload, options)
        finally:
            self._drop(store, dataset)
        # The answer came through Spark's own channel from a process that this fit started.
        result: TrainResult = cloudpickle.loads(answers[0])
        with self._timed("publish"):
            model = estimator._make_model(store.read_bytes(result.model_path), result)
        self._account(result)
        model._resetUid(estimator.uid)
        estimator._copyValues(model)
        model._set(run_id=self._run_id)
        model._phases = dict(self._phases)
        self._say("phases: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self._phases.items()))
        return model

    def _drop(self, store: Store, dataset: str) -> None:
        """Delete the dataset; that must not hide what else went wrong, nor lose a model that was trained."""
        try:
            store.delete(dataset)
        except OSError as exc:
            logger.warning("%s: cannot delete %s: %s", self._run_id, store.url_of(dataset), exc)

    def _check(self, session: SparkSession) -> tuple[Store, tuple[ColumnSpec, ...], BatchSpec, int]:
        """Find every error that can be found without a Spark job."""
        estimator = self._estimator
        estimator._check()
        store = estimator._required("store")
        if not isinstance(store, Store):
            raise ParamError(
                f"store={store!r} is a {type(store).__name__}; give hvdspark.Store.create('/shared/folder')",
                param="store",
            )
        columns, batch = estimator._batch(self._df.schema)
        _, outputs = estimator._describe()
        if outputs is not None:
            # What transform would refuse is found out now, not after the training.
            scored_schema(StructType(), planned_outputs(estimator, outputs))
        schema.split_condition(self._df.schema, estimator._value("validation"))
        num_proc = estimator._value("num_proc") or count_slots(session)
        check_slots(session, num_proc, estimator._launch_options(self._run_id, store).slots_timeout_s)
        store.check_writable()
        if store.exists(run_folder(self._run_id)):
            raise ParamError(
                f"run_id='{self._run_id}' exists already in {store}; give another one, or none for a new one",
                param="run_id",
            )
        return store, columns, batch, num_proc

    def _split(self) -> Split:
        validation = self._estimator._value("validation")
        seed = self._estimator._value("random_seed")
        if isinstance(validation, str):
            return Split(column=validation, seed=seed)
        return Split(fraction=validation or 0.0, seed=seed)

    def _plan(self, store: Store, dataset: str, manifest: Manifest, batch: BatchSpec, num_proc: int) -> FitPlan:
        value = self._estimator._value
        shuffle, seed, batch_rows = value("shuffle"), value("random_seed"), value("batch_size")
        train = plan_shards(manifest.splits[TRAIN], num_proc, batch_rows, keep_order=not shuffle, seed=seed)
        val = None
        if manifest.rows(VAL):
            val_rows = value("val_batch_size") or batch_rows
            val = plan_shards(manifest.splits[VAL], num_proc, val_rows, keep_order=False, seed=seed)
        return FitPlan(
            run_id=self._run_id,
            store=store.ref(),
            dataset=dataset,
            columns=manifest.columns,
            batch=schema.resolve(batch, manifest.columns),
            train=train,
            val=val,
            epochs=value("epochs"),
            shuffle=shuffle,
            seed=seed,
            reader_workers=value("train_reader_num_workers"),
            cache_in_memory=value("inmemory_cache_all"),
            train_steps_per_epoch=value("train_steps_per_epoch"),
            validation_steps_per_epoch=value("validation_steps_per_epoch"),
        )

    def _account(self, result: TrainResult) -> None:
        """Split the stage's time into what the launch cost and what the ranks did."""
        in_rank = sum(result.phases.values())
        publish = self._phases.pop("publish")
        self._phases["launch"] = max(0.0, self._phases["launch"] - in_rank)
        for name, seconds in result.phases.items():
            self._phases[name] = self._phases.get(name, 0.0) + seconds
        self._phases["publish"] = self._phases.get("publish", 0.0) + publish

    def _say(self, text: str) -> None:
        if self._estimator._value("verbose"):
            logger.info("%s: %s", self._run_id, text)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._phases[phase] = time.perf_counter() - start


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
    """

    _loader: ClassVar[str]

    def __init__(
        self,
        data: bytes = b"",
        inputs: Sequence[ModelTensor] = (),
        outputs: Sequence[ModelTensor] = (),
        history: Mapping[str, list[float]] | None = None,
    ) -> None:
        super().__init__()
        self._setDefault(transform_batch_size=4096)
        self._data = data
        self._inputs = tuple(inputs)
        self._outputs = tuple(outputs)
        self._history = {name: list(values) for name, values in (history or {}).items()}
        self._phases: dict[str, float] = {}
        self._rows_per_s = 0.0
        self._sent: tuple[str, str, Broadcast[bytes]] | None = None

    @abc.abstractmethod
    def _payload(self) -> bytes:
        """Return what the loader makes the scorer of."""

    def getHistory(self) -> dict[str, list[float]]:
        """Return the training history: per metric the value of each epoch, over the rows of all ranks."""
        return {name: list(values) for name, values in self._history.items()}

    @property
    def phases(self) -> dict[str, float]:
        """Seconds that each phase of the fit took; empty for a model that was loaded."""
        return dict(self._phases)

    @property
    def rows_per_s(self) -> float:
        """Training rows per second over all ranks, without validation and the first epoch; zero after loading."""
        return self._rows_per_s

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
        columns, batch = schema.check_columns(
            frame_schema, feature_cols=self._value("feature_cols"), inputs=self._inputs or None
        )
        return ScorePlan(
            columns=columns,
            features=batch.features,
            outputs=self.output_columns,
            batch_rows=self._value("transform_batch_size"),
            loader=self._loader,
            key=key,
        )


def planned_outputs(params: ModelParams, outputs: Sequence[ModelTensor]) -> tuple[OutputColumn, ...]:
    """Decide the columns that a model's outputs become, by the parameters of the model or of its estimator.

    Raises
    ------
    ParamError
        When names, types and outputs do not go together.
    """
    names = params._value("output_cols")
    if names is None:
        names = [f"{label}__output" for label in params._value("label_cols") or ()]
    kinds = params._value("output_types") or [None] * len(names)
    if len(kinds) != len(names):
        raise ParamError(
            f"output_types has {len(kinds)} entries for {len(names)} output columns; give one per column",
            param="output_types",
        )
    return output_columns(names, outputs, kinds)


def new_run_id(kind: str) -> str:
    """Make a run id that sorts by time."""
    return f"{kind}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:8]}"


def tensors_to_json(tensors: Sequence[ModelTensor]) -> list[dict[str, Any]]:
    """Describe tensors by JSON values."""
    return [dataclasses.asdict(tensor) for tensor in tensors]


def tensors_from_json(values: Sequence[Mapping[str, Any]]) -> tuple[ModelTensor, ...]:
    """Read what :func:`tensors_to_json` made."""
    return tuple(ModelTensor(value["name"], tuple(value["shape"]), value["dtype"]) for value in values)
