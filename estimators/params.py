"""The parameters of the estimators and models, and the setters and getters that Spark ML users expect.

Parameters hold JSON values only, so that Spark's own persistence can write them. What is no JSON value (the model, the
optimizer, the Store, …) is an *attribute*: the same setters and getters, but saved in files beside the metadata.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, get_args

from hvdspark.estimators.converters import (
    Converter,
    boolean,
    boolean_or,
    column_names,
    integer,
    non_negative_int,
    one_of,
    output_types,
    positive_float,
    positive_int,
    text,
    text_dict,
    to_compression,
    to_feature_cols,
    to_fills,
    to_padding,
    to_run_id,
    to_seed,
    to_shapes,
    to_validation,
    zero_or_at_least,
)
from pyspark.ml.param import Param, Params

from hvdspark.data.missing import Missing
from hvdspark.launch.answers import LEAST_STALL_S
from hvdspark.launch.control import CONTROLLERS
from hvdspark.plan import CacheMode


def param(name: str, doc: str, converter: Converter | None = None) -> Param[Any]:
    """Declare a parameter in a class body."""
    return Param(Params._dummy(), name, doc, typeConverter=converter)


class WithAccessors(Params):
    """Gives every parameter and attribute its ``setX`` and ``getX``; ``batch_size`` gets ``setBatchSize``.

    Attributes
    ----------
    _attributes : dict of str to object
        Names and defaults of what is no parameter, because JSON cannot hold it.
    """

    _attributes: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        params = [name for name in dir(cls) if isinstance(inspect.getattr_static(cls, name), Param)]
        for name in params:
            _add_accessors(cls, name, _param_setter(name), _param_getter(name))
        for name in cls._attributes:
            _add_accessors(cls, name, _attribute_setter(name), _attribute_getter(name))

    def _init_attributes(self) -> None:
        for name, default in self._attributes.items():
            setattr(self, _slot(name), copy.copy(default))

    def _assign(self, values: Mapping[str, Any]) -> None:
        """Set parameters and attributes by name; ``None`` leaves a default in place."""
        for name, value in values.items():
            if value is not None:
                getattr(self, _accessor("set", name))(value)

    def _converted(self) -> Self:
        """Return a copy whose values went through their converters; grids and ``fit(df, {…})`` set them as they are.

        Raises
        ------
        ParamError
            For a value that cannot be.
        """
        converted = self.copy()
        for key, value in converted._paramMap.items():
            converted._paramMap[key] = key.typeConverter(value)
        return converted

    def _value(self, name: str) -> Any:
        """Return a parameter's value, or ``None`` where it has none."""
        found = self.getParam(name)
        return self.getOrDefault(found) if self.isDefined(found) else None


def _accessor(prefix: str, name: str) -> str:
    return prefix + "".join(part[:1].upper() + part[1:] for part in name.split("_"))


def _slot(name: str) -> str:
    return f"_{name}"


def _add_accessors(cls: type, name: str, setter: Callable[..., Any], getter: Callable[..., Any]) -> None:
    for prefix, function in (("set", setter), ("get", getter)):
        accessor = _accessor(prefix, name)
        # A class's own method wins, wherever in its bases it is.
        if hasattr(cls, accessor):
            continue
        function.__name__ = accessor
        function.__qualname__ = f"{cls.__qualname__}.{accessor}"
        function.__doc__ = f"{prefix.capitalize()} ``{name}``." + (" Returns self." if prefix == "set" else "")
        setattr(cls, accessor, function)


def _param_setter(name: str) -> Callable[..., Any]:
    def setter(self: Any, value: Any) -> Any:
        if value is None:
            self.clear(self.getParam(name))
            return self
        return self._set(**{name: value})

    return setter


def _param_getter(name: str) -> Callable[..., Any]:
    return lambda self: self._value(name)


def _attribute_setter(name: str) -> Callable[..., Any]:
    def setter(self: Any, value: Any) -> Any:
        setattr(self, _slot(name), value)
        return self

    return setter


def _attribute_getter(name: str) -> Callable[..., Any]:
    return lambda self: getattr(self, _slot(name))


class ModelParams(WithAccessors):
    """Parameters that an estimator hands on to its model."""

    feature_cols = param(
        "feature_cols",
        "one entry per model input: a column, or a list of columns that are concatenated",
        to_feature_cols,
    )
    label_cols = param("label_cols", "one column per model output", column_names("label_cols"))
    output_cols = param(
        "output_cols",
        "names of the columns that transform appends, one per model output (default: <label>__output)",
        column_names("output_cols"),
    )
    output_types = param(
        "output_types",
        "type of each output column: 'scalar', 'vector', 'array', or None to choose by its shape",
        output_types,
    )
    transform_batch_size = param(
        "transform_batch_size", "rows per call of the model in transform", positive_int("transform_batch_size")
    )
    fill_nulls = param("fill_nulls", "what stands for a null, by column (default: nulls are refused)", to_fills)
    padding = param(
        "padding",
        "what fills up short rows of array columns, by column: a value, or {'value': …, 'length': …} (default: rows of"
        " different lengths are refused)",
        to_padding,
    )
    run_id = param("run_id", "name of the run and of its folder in the Store (default: a new one)", to_run_id)

    @property
    def label_columns(self) -> tuple[str, ...]:
        """The columns that the model learns, or has learnt, to predict, one per output; empty where none are given."""
        return tuple(self._value("label_cols") or ())

    @property
    def missing(self) -> Missing:
        """What stands for nulls, and fills up short rows."""
        return self._missing()

    def _missing(self) -> Missing:
        return Missing.from_params(self._value("fill_nulls"), self._value("padding"))


class EstimatorParams(ModelParams):
    """Parameters of training, by the names that horovod.spark gave them."""

    num_proc = param(
        "num_proc", "number of ranks (default: as many as the cluster can run at once)", positive_int("num_proc")
    )
    batch_size = param("batch_size", "training rows per rank and step", positive_int("batch_size"))
    val_batch_size = param(
        "val_batch_size", "validation rows per rank and step (default: batch_size)", positive_int("val_batch_size")
    )
    epochs = param("epochs", "passes over the training rows", positive_int("epochs"))
    learning_rate = param("learning_rate", "replaces the optimizer's learning rate", positive_float("learning_rate"))
    scale_learning_rate = param(
        "scale_learning_rate", "multiply the learning rate by the number of ranks", boolean("scale_learning_rate")
    )
    validation = param(
        "validation", "share of rows to validate on, or the name of a 0/1 column that marks them", to_validation
    )
    sample_weight_col = param("sample_weight_col", "column with each row's weight", text("sample_weight_col"))
    compress_sparse_cols = param(
        "compress_sparse_cols",
        "store all vector columns sparse (default: only wide ones)",
        boolean("compress_sparse_cols"),
    )
    label_shapes = param("label_shapes", "shape of each label, where the column's own does not do", to_shapes)
    shuffle = param("shuffle", "shuffle the training rows anew in every epoch", boolean("shuffle"))
    random_seed = param("random_seed", "seed of the split, of the order and of the ranks", to_seed)
    verbose = param(
        "verbose",
        "0: silent; 1: a bar in a terminal or notebook, elsewhere a line per epoch; 2: a line per epoch",
        integer("verbose"),
    )
    tensorboard = param("tensorboard", "write TensorBoard's event files into the run's folder", boolean("tensorboard"))
    timeline = param("timeline", "write Horovod's timeline into the run's folder", boolean("timeline"))
    gradient_compression = param(
        "gradient_compression", "'none', or 'fp16' to send half-precision gradients", to_compression
    )
    allreduce = param(
        "allreduce",
        "what averages the gradients: 'horovod', 'shared_memory', or 'auto' for the faster of both",
        one_of("allreduce", ("auto", "horovod", "shared_memory")),
    )
    backward_passes_per_step = param(
        "backward_passes_per_step",
        "batches whose gradients are averaged locally before they are sent",
        positive_int("backward_passes_per_step"),
    )
    train_steps_per_epoch = param(
        "train_steps_per_epoch",
        "steps of an epoch (default: all rows once); epochs then go on where the last one stopped",
        positive_int("train_steps_per_epoch"),
    )
    validation_steps_per_epoch = param(
        "validation_steps_per_epoch",
        "validation steps per epoch and rank (default: all rows)",
        positive_int("validation_steps_per_epoch"),
    )
    train_reader_num_workers = param(
        "train_reader_num_workers", "threads of a rank that read rows", positive_int("train_reader_num_workers")
    )
    cache = param(
        "cache",
        "where a rank keeps its decoded rows for later epochs: 'memory', 'disk', 'none', or 'auto' for the first of"
        " these that has room",
        one_of("cache", get_args(CacheMode)),
    )
    inmemory_cache_all = param(
        "inmemory_cache_all",
        "the same as cache='memory', by the name that horovod.spark gave it",
        boolean("inmemory_cache_all"),
    )
    data = param(
        "data",
        "'petastorm' writes the rows as a dataset first, 'direct' hands them to the ranks",
        one_of("data", ("petastorm", "direct")),
    )
    keep_dataset = param(
        "keep_dataset",
        "keep the written rows in the Store, for later fits on the same DataFrame",
        boolean("keep_dataset"),
    )
    use_gpu = param("use_gpu", "train on GPUs where there are any", boolean("use_gpu"))
    controller = param("controller", "control plane of Horovod", one_of("controller", CONTROLLERS))
    start_timeout = param(
        "start_timeout", "seconds within which all ranks must have begun", positive_float("start_timeout")
    )
    stall_timeout_s = param(
        "stall_timeout_s",
        "seconds after which a rank that was stopped or does not move on is given up; 0 for never",
        zero_or_at_least("stall_timeout_s", LEAST_STALL_S),
    )
    slots_timeout_s = param(
        "slots_timeout_s",
        "seconds to wait for executors that are still coming, also in the place of lost ones; 0 for not at all",
        zero_or_at_least("slots_timeout_s", 0),
    )
    warm_pool = param(
        "warm_pool",
        "keep processes on the executors that have imported the framework, for the next fit",
        boolean("warm_pool"),
    )
    allow_insecure_transport = param(
        "allow_insecure_transport",
        "let the ranks talk unprotected in a session that protects Spark's own connections",
        boolean("allow_insecure_transport"),
    )
    nics = param("nics", "network interfaces that the ranks may use", column_names("nics"))
    max_restarts = param(
        "max_restarts",
        "how often the ranks are started again when some were killed or lost",
        non_negative_int("max_restarts"),
    )
    min_proc = param(
        "min_proc",
        "with how few ranks the training may go on when executors were lost and none have come in their place",
        positive_int("min_proc"),
    )
    warm_start = param(
        "warm_start",
        "the model whose weights the training begins with: the path of a saved one, 'runs/<id>', or 'alias:<name>'",
        text("warm_start"),
    )
    checkpoint_steps = param(
        "checkpoint_steps",
        "steps after which the state of the training is kept, besides the end of every epoch",
        positive_int("checkpoint_steps"),
    )
    keep_checkpoints = param(
        "keep_checkpoints", "how many states of the training are kept", positive_int("keep_checkpoints")
    )
    on_nan = param(
        "on_nan",
        "what to do when gradients or the loss are not finite: 'fail', 'stop' with the model before, or 'skip' steps",
        one_of("on_nan", ("fail", "stop", "skip")),
    )
    rdma = param(
        "rdma",
        "whether to use RDMA devices: 'auto' where there are any, True to insist on them, False never",
        boolean_or("rdma", "auto"),
    )
    mlflow = param("mlflow", "log parameters, metrics and the model to MLflow", boolean("mlflow"))
    backend_env = param("backend_env", "environment variables of the training processes", text_dict("backend_env"))
