"""``KerasEstimator``: fits a Keras model on a DataFrame with Horovod on barrier tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from hvdspark.estimators.base import HorovodEstimator, Tensors
from hvdspark.estimators.keras import codec, starting
from hvdspark.estimators.keras.facts import config_facts, model_facts
from hvdspark.estimators.keras.model import KerasModel
from hvdspark.estimators.keras.spec import KerasSpec
from hvdspark.estimators.keywords import sort_out
from hvdspark.estimators.persistence import Persistable

from hvdspark.errors import ModelFormatError, ParamError
from hvdspark.history import EpochRecord
from hvdspark.plan import TrainResult
from hvdspark.store import Store
from hvdspark.warmstart import WarmStart
from hvdspark.worker.checkpoint import BestOf
from hvdspark.worker.job import Job

if TYPE_CHECKING:
    import keras

_FILE = f"model{codec.SUFFIX}"
_COMPILING = ("optimizer", "loss", "loss_weights", "metrics")


class KerasEstimator(HorovodEstimator, Persistable):
    """Trains a Keras 3 model on the rows of a DataFrame, on several ranks of Spark barrier tasks.

    Parameters
    ----------
    num_proc
        Number of ranks; by default as many as the cluster can run at once.
    store
        Where data, checkpoints and the model go; the driver and all executors must reach it.
    model
        The Keras model. It is not changed.
    optimizer, loss, loss_weights, metrics
        As for ``keras.Model.compile``. Without a loss the model must be compiled, and trains as it was.
    feature_cols
        One entry per model input: a column, or a list of columns that are concatenated.
    label_cols
        One column per model output.
    sample_weight_col
        Column with each row's weight.
    fill_nulls
        What stands for a null, by column, in ``fit`` and in ``transform``; nulls of other columns are refused.
    padding
        What fills up short rows of array columns, by column: ``{"tokens": 0}`` up to the length of the model's input,
        or ``{"tokens": {"value": 0, "length": 64}}``. A longer row is an error.
    compress_sparse_cols
        Store all vector columns sparse; by default only those of more than 4,096 values.
    batch_size, val_batch_size
        Rows per rank and step.
    epochs
        Passes over the training rows.
    validation
        Share of the rows to validate on, or the name of a 0/1 column that marks them.
    callbacks
        Keras callbacks. They run on every rank with the same metrics; those that write files run on rank 0 alone.
    checkpoint_callback
        Which epoch's model is returned: a :class:`~hvdspark.estimators.BestOf`, or a Keras ``ModelCheckpoint``, of
        which ``monitor``, ``mode`` and ``save_best_only`` count. By default the last one.
    custom_objects
        Classes and functions of your own, by name, that Keras needs to load the model.
    learning_rate
        Replaces the optimizer's, so that a ``ParamGridBuilder`` can vary it.
    scale_learning_rate
        Whether the learning rate is multiplied by the number of ranks, as Horovod advises; default ``True``.
    gradient_compression
        ``"fp16"`` to send half-precision gradients; in shared memory nothing is sent, and they keep their precision.
    allreduce
        What averages the gradients: ``"horovod"``; ``"shared_memory"``, which takes ranks on one host and CPUs; or
        ``"auto"``, the default, for the faster of both where both can be.
    backward_passes_per_step
        Batches whose gradients are averaged locally before they are sent.
    shuffle
        Whether rows are shuffled anew in every epoch; without, all ranks together go through the rows in order.
    random_seed
        Seed of the split, of the order and of the ranks.
    cache
        Where a rank keeps its decoded rows for later epochs: ``"memory"``, ``"disk"``, ``"none"``, or ``"auto"`` for
        the first of these that has room.
    data
        ``"petastorm"`` writes the rows as a dataset first; ``"direct"`` hands them from Spark's tasks to the ranks,
        where they lie in Arrow files on local disks while the fit runs.
    keep_dataset
        Whether the rows stay in the Store for later fits on the same DataFrame (see :meth:`hvdspark.Store.gc`), or go
        when the fit ends.
    output_cols, output_types
        Names and types of the columns that the model appends.
    warm_pool
        Whether processes that have imported TensorFlow are kept on the executors for the next fit; default ``True``.
    controller
        By what Horovod's ranks meet and talk: ``"gloo"``, ``"mpi"``, or ``"auto"`` for MPI where it can use RDMA
        devices that Gloo cannot.
    nics, rdma
        The network interfaces or RDMA devices to use, and whether to use RDMA at all: ``"auto"`` where there is any,
        ``True`` to insist on it, ``False``.
    allow_insecure_transport
        Whether the ranks may talk unencrypted and unauthenticated on a cluster whose session has
        ``spark.authenticate``, ``spark.network.crypto.enabled`` or ``spark.ssl.enabled``; by default that is refused.
    start_timeout, backend_env, use_gpu
        How the ranks are started.
    stall_timeout_s
        Seconds after which a rank that was stopped, or does not move on (a callback that never returns, say), is given
        up, and the ranks are started again; default 600, at least 5, 0 for never.
    slots_timeout_s
        Seconds to wait for executors that are still coming, before the first launch and, in the place of lost ones,
        before the next; default 30. YARN and Kubernetes may take longer to bring one.
    max_restarts
        How often the ranks are started again, from the last checkpoint, when some of them were killed or lost; default
        3. An error that the training itself raises is not tried again.
    min_proc
        With how few ranks the training may go on when executors were lost and, within ``slots_timeout_s``, none have
        come in their place; by default with ``num_proc`` only. The epoch that was interrupted begins again then. A run
        that a new driver goes on with may begin with as few, a new run may not.
    warm_start
        The model whose weights the training begins with, in place of those of ``model``, which must be built alike: the
        path of a saved ``KerasModel``, or of a ``PipelineModel`` with one in it; ``"runs/<id>"``, a run in the Store;
        or ``"alias:champion"``, what that alias refers to. The optimizer begins anew. No code of it is run.
    checkpoint_steps, keep_checkpoints
        The state of the training is kept at the end of every epoch and, where given, every so many steps; the last two
        by default.
    on_nan
        What to do when averaged gradients, or the loss of an epoch, are not finite: ``"fail"``, the default, with an
        error that names epoch, step and rank; ``"stop"`` with the model before that step; or ``"skip"`` such steps.
    verbose
        What a fit shows: 0 nothing; 1, the default, a bar in a terminal or notebook, elsewhere a line in the log for
        every epoch; 2 these lines in any case.
    tensorboard, timeline
        Whether to write TensorBoard's event files, and Horovod's timeline, into the run's folder. With a timeline,
        gradients go through Horovod, also where shared memory is faster.
    run_id
        Name of the run's folder in the Store. One that was interrupted goes on from its last checkpoint.
    mlflow
        Whether parameters, metrics per epoch and the model are logged to MLflow, from the driver: to the tracking
        server and experiment that are set there, in the run that is active or a new one. Needs the extra ``mlflow``.
    others
        Every other keyword of ``horovod.spark.keras.KerasEstimator`` is taken with a warning where it has nothing to
        tune here, or refused with what to do instead.

    Examples
    --------
    >>> estimator = KerasEstimator(
    ...     num_proc=2, store=store, model=model, optimizer="adam", loss="mse",
    ...     feature_cols=["features"], label_cols=["label"], batch_size=256, epochs=5,
    ... )                                                       # doctest: +SKIP
    >>> estimator.fit(df).transform(df)                         # doctest: +SKIP
    """

    _kind = "keras"
    _trainer = "hvdspark.estimators.keras.trainer:train"
    _suffix = codec.SUFFIX
    _saved = f"{KerasModel.__module__}.{KerasModel.__name__}"
    _attributes: ClassVar[Mapping[str, Any]] = {
        **HorovodEstimator._attributes,
        "optimizer": None,
        "loss": None,
        "loss_weights": None,
        "metrics": None,
        "custom_objects": {},
        "callbacks": (),
        "checkpoint_callback": None,
    }
    _optimizer: Any
    _loss: Any
    _metrics: Any
    _callbacks: Sequence[Any]
    _custom_objects: Mapping[str, Any]
    _checkpoint_callback: Any
    # The model with other weights, where the training begins with such.
    _started: bytes | None = None

    def __init__(
        self,
        *,
        num_proc: int | None = None,
        store: Store | None = None,
        model: keras.Model | None = None,
        optimizer: keras.optimizers.Optimizer | str | None = None,
        loss: Any = None,
        loss_weights: Any = None,
        metrics: Any = None,
        feature_cols: Sequence[str | Sequence[str]] | None = None,
        label_cols: Sequence[str] | None = None,
        sample_weight_col: str | None = None,
        label_shapes: Sequence[Sequence[int]] | None = None,
        fill_nulls: Mapping[str, bool | int | float | str] | None = None,
        padding: Mapping[str, Any] | None = None,
        compress_sparse_cols: bool | None = None,
        batch_size: int | None = None,
        val_batch_size: int | None = None,
        epochs: int | None = None,
        validation: float | str | None = None,
        callbacks: Sequence[keras.callbacks.Callback] | None = None,
        checkpoint_callback: BestOf | keras.callbacks.ModelCheckpoint | None = None,
        custom_objects: Mapping[str, Any] | None = None,
        learning_rate: float | None = None,
        scale_learning_rate: bool | None = None,
        gradient_compression: Any = None,
        allreduce: str | None = None,
        backward_passes_per_step: int | None = None,
        train_steps_per_epoch: int | None = None,
        validation_steps_per_epoch: int | None = None,
        shuffle: bool | None = None,
        random_seed: int | None = None,
        verbose: int | None = None,
        tensorboard: bool | None = None,
        timeline: bool | None = None,
        run_id: str | None = None,
        mlflow: bool | None = None,
        max_restarts: int | None = None,
        min_proc: int | None = None,
        warm_start: str | None = None,
        checkpoint_steps: int | None = None,
        keep_checkpoints: int | None = None,
        on_nan: str | None = None,
        output_cols: Sequence[str] | None = None,
        output_types: Sequence[str | None] | None = None,
        transform_batch_size: int | None = None,
        train_reader_num_workers: int | None = None,
        cache: str | None = None,
        inmemory_cache_all: bool | None = None,
        data: str | None = None,
        keep_dataset: bool | None = None,
        use_gpu: bool | None = None,
        controller: str | None = None,
        nics: Sequence[str] | None = None,
        rdma: bool | str | None = None,
        start_timeout: float | None = None,
        stall_timeout_s: float | None = None,
        slots_timeout_s: float | None = None,
        warm_pool: bool | None = None,
        allow_insecure_transport: bool | None = None,
        backend_env: Mapping[str, str] | None = None,
        **others: Any,
    ) -> None:
        given = {name: value for name, value in locals().items() if name not in ("self", "others", "__class__")}
        super().__init__()
        sort_out(others, given, type(self).__name__)
        self._setDefault(
            batch_size=32,
            epochs=1,
            scale_learning_rate=True,
            shuffle=True,
            random_seed=0,
            verbose=1,
            mlflow=False,
            tensorboard=False,
            timeline=False,
            gradient_compression="none",
            allreduce="auto",
            backward_passes_per_step=1,
            train_reader_num_workers=2,
            cache="auto",
            inmemory_cache_all=False,
            data="petastorm",
            keep_dataset=True,
            compress_sparse_cols=False,
            use_gpu=True,
            controller="gloo",
            rdma="auto",
            max_restarts=3,
            keep_checkpoints=2,
            on_nan="fail",
            start_timeout=120.0,
            stall_timeout_s=600.0,
            slots_timeout_s=30.0,
            warm_pool=True,
            allow_insecure_transport=False,
            transform_batch_size=4096,
        )
        self._init_attributes()
        self._assign(given)

    def _check(self) -> None:
        model = self._required_model()
        callbacks = list(self._callbacks or ())
        import keras

        if keras.backend.backend() != "tensorflow":
            raise ParamError(
                f"Keras runs on {keras.backend.backend()} here, but Horovod trains Keras on TensorFlow; set"
                " KERAS_BACKEND=tensorflow before keras is imported",
                param="model",
            )
        if self._loss is None and not getattr(model, "compiled", False):
            raise ParamError("give loss=, or a model that is compiled", param="loss")
        for callback in callbacks:
            if not isinstance(callback, keras.callbacks.Callback):
                raise ParamError(
                    f"callbacks holds a {type(callback).__name__}, which is no keras.callbacks.Callback",
                    param="callbacks",
                )
        if self._value("timeline") and self._value("allreduce") == "shared_memory":
            raise ParamError(
                "timeline=True and allreduce='shared_memory': nothing goes through Horovod then that a timeline could"
                " show; leave out one of the two",
                param="timeline",
            )
        if self._value("learning_rate") is not None:
            self._check_learning_rate(model)
        best_of = self._best_of()
        if best_of is not None and best_of.monitor.startswith("val_") and self._value("validation") is None:
            raise ParamError(
                f"checkpoint_callback monitors '{best_of.monitor}', but there is no validation; give validation=0.1, or"
                " monitor a training metric such as 'loss'",
                param="checkpoint_callback",
            )

    def _check_learning_rate(self, model: keras.Model) -> None:
        """Refuse a learning rate that would replace a schedule, which Keras does not allow."""
        import keras

        optimizer = self._optimizer if self._optimizer is not None else model.optimizer
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        schedule = getattr(optimizer, "_learning_rate", None)
        if isinstance(schedule, keras.optimizers.schedules.LearningRateSchedule):
            raise ParamError(
                f"learning_rate={self._value('learning_rate')} cannot replace the optimizer's schedule"
                f" ({type(schedule).__name__}); give an optimizer with a plain learning rate",
                param="learning_rate",
            )

    def _required_model(self) -> keras.Model:
        import keras

        model = self._required("model")
        if not isinstance(model, keras.Model):
            raise ParamError(
                f"model is a {type(model).__name__}; give a keras.Model of Keras {keras.__version__}", param="model"
            )
        return model

    def _describe(self) -> tuple[Tensors, Tensors]:
        return codec.describe(self._required_model())

    def _job(self) -> Job:
        spec = KerasSpec(
            model=self._started or codec.model_to_bytes(self._required_model()),
            compiling={name: codec.to_config(getattr(self, f"_{name}")) for name in _COMPILING},
            custom_objects=self._all_custom_objects(),
            callbacks=tuple(self._callbacks or ()),
            learning_rate=self._value("learning_rate"),
            scale_learning_rate=self._value("scale_learning_rate"),
            # In shared memory there is nothing that Horovod could put on a timeline.
            allreduce="horovod" if self._value("timeline") else self._value("allreduce"),
            compression=self._value("gradient_compression"),
            passes_per_step=self._value("backward_passes_per_step"),
            best_of=self._best_of(),
            use_gpu=self._value("use_gpu"),
            checkpoint_steps=self._value("checkpoint_steps"),
            keep_checkpoints=self._value("keep_checkpoints"),
            on_nan=self._value("on_nan"),
            tensorboard=self._value("tensorboard"),
            timeline=self._value("timeline"),
        )
        # By address: only the training processes import TensorFlow's Horovod.
        return Job(self._trainer, (spec,))

    def _start_from(self, start: WarmStart) -> None:
        own = codec.model_to_bytes(self._required_model())
        self._started = starting.start_from(own, start.data, self._all_custom_objects(), start.model)

    def _describe_trained(self, data: bytes) -> tuple[Tensors, Tensors]:
        return codec.describe(codec.model_from_bytes(data, self._all_custom_objects(), compiled=False))

    def _make_model(self, data: bytes, result: TrainResult) -> KerasModel:
        origin = self._required("store").url_of(result.model_path)
        codec.require_whole(data, origin)
        epochs = [EpochRecord.from_plain(values) for values in result.epochs]
        model = KerasModel(data, result.inputs, result.outputs, result.history, self._all_custom_objects(), epochs)
        model._origin = origin
        model._rows_per_s = result.rows_per_s
        model._data_wait_share = result.data_wait_share
        return model

    def _all_custom_objects(self) -> dict[str, Any]:
        """Collect the user's own objects, also those registered with Keras and functions given as loss or metric."""
        import keras

        functions = codec.functions_in([self._loss, self._metrics])
        return {**keras.saving.get_custom_objects(), **functions, **dict(self._custom_objects or {})}

    def _attribute_facts(self) -> dict[str, Any]:
        best_of = self._best_of()
        return {
            **super()._attribute_facts(),
            "model": model_facts(self._required_model()),
            **{name: config_facts(codec.to_config(getattr(self, f"_{name}"))) for name in _COMPILING},
            "callbacks": [type(callback).__name__ for callback in self._callbacks or ()],
            "custom_objects": sorted(self._custom_objects or {}),
            "checkpoint_callback": None if best_of is None else {"monitor": best_of.monitor, "mode": best_of.mode},
        }

    def _best_of(self) -> BestOf | None:
        callback = self._checkpoint_callback
        if callback is None or isinstance(callback, BestOf):
            return callback
        import keras

        if not isinstance(callback, keras.callbacks.ModelCheckpoint):
            raise ParamError(
                f"checkpoint_callback is a {type(callback).__name__}; give hvdspark.estimators.BestOf('val_loss') or a"
                " keras.callbacks.ModelCheckpoint",
                param="checkpoint_callback",
            )
        if not callback.save_best_only:
            return None
        return BestOf(callback.monitor, callback.mode)

    def _to_files(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        if self._callbacks:
            names = ", ".join(type(callback).__name__ for callback in self._callbacks)
            raise ModelFormatError(
                f"callbacks ({names}) cannot be saved: they are programs, not data. Save with setCallbacks([]), and set"
                " them again after loading."
            )
        best_of = self._best_of()
        store = self._store
        extra = {
            "compiling": {name: codec.to_config(getattr(self, f"_{name}")) for name in _COMPILING},
            # The address alone: storage options may hold secrets.
            "store": store.url if isinstance(store, Store) else None,
            "store_private": not isinstance(store, Store) or store.private,
            "best_of": None if best_of is None else [best_of.monitor, best_of.mode],
        }
        files = {} if self._model is None else {_FILE: codec.model_to_bytes(self._model)}
        return extra, files

    @classmethod
    def _from_files(cls, extra: Mapping[str, Any], files: Mapping[str, bytes]) -> Self:
        compiling = {name: codec.from_config(value) for name, value in extra["compiling"].items()}
        return cls(
            **compiling,
            store=None if extra["store"] is None else Store.create(extra["store"], private=extra["store_private"]),
            checkpoint_callback=None if extra["best_of"] is None else BestOf(*extra["best_of"]),
            model=codec.model_from_bytes(files[_FILE]) if _FILE in files else None,
        )
