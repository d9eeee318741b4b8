"""The parameters of the estimators and models, and the setters and getters that Spark ML users expect.

Parameters hold JSON values only, so that Spark's own persistence can write them. What is no JSON value (the model, the
optimizer, the Store, …) is an *attribute*: the same setters and getters, but saved in files beside the metadata.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Self, get_args

from pyspark.ml.param import Param, Params, TypeConverters

from hvdspark.data.missing import Missing
from hvdspark.errors import ParamError, closest
from hvdspark.launch.barrier import CONTROLLERS
from hvdspark.plan import CacheMode
from hvdspark.store import _NAME

Converter = Callable[[Any], Any]

# What may stand for a null: a JSON value.
_FILLER = bool | int | float | str


def positive_int(name: str) -> Converter:
    """Return a converter to an integer of at least one."""
    return _checked(name, TypeConverters.toInt, lambda value: value >= 1, "an integer of at least 1")


def positive_float(name: str) -> Converter:
    """Return a converter to a number above zero."""
    return _checked(name, TypeConverters.toFloat, lambda value: 0 < value < math.inf, "a number above 0")


def one_of(name: str, choices: Iterable[str]) -> Converter:
    """Return a converter to one of several names."""
    known = tuple(choices)

    def convert(value: Any) -> str:
        if value not in known:
            raise ParamError(
                f"{name}={value!r}: choose one of {', '.join(known)}.{closest(str(value), known)}", param=name
            )
        return str(value)

    return convert


def boolean(name: str) -> Converter:
    """Return a converter to a boolean."""
    return _checked(name, TypeConverters.toBoolean, lambda _: True, "True or False")


def integer(name: str) -> Converter:
    """Return a converter to an integer."""
    return _checked(name, TypeConverters.toInt, lambda _: True, "an integer")


def text(name: str) -> Converter:
    """Return a converter to a text."""
    return _checked(name, lambda value: value, lambda value: isinstance(value, str) and value != "", "a name")


def to_seed(value: Any) -> int:
    """Convert to a seed, as all generators take it."""
    return int(
        _checked("random_seed", TypeConverters.toInt, lambda seed: 0 <= seed < 2**32, "an integer from 0 to 2**32 - 1")(
            value
        )
    )


def column_names(name: str) -> Converter:
    """Return a converter to a list of column names."""

    def convert(value: Any) -> list[str]:
        if isinstance(value, str) or not _is_list_of(value, str):
            raise ParamError(f"{name}={value!r}: give a list of column names, such as ['a', 'b']", param=name)
        return list(value)

    return convert


def to_feature_cols(value: Any) -> list[str | list[str]]:
    """Convert to a list of column names and of lists of them."""
    names = [] if isinstance(value, str) or not isinstance(value, list | tuple) else list(value)
    converted: list[str | list[str]] = []
    for entry in names:
        if isinstance(entry, str):
            converted.append(entry)
        elif isinstance(entry, list | tuple) and entry and _is_list_of(entry, str):
            converted.append(list(entry))
        else:
            names = []
    if not names:
        raise ParamError(
            f"feature_cols={value!r}: give one entry per model input, each a column name or a list of column names that"
            " are concatenated, such as ['v'] or [['a', 'b'], 'v']",
            param="feature_cols",
        )
    return converted


def to_validation(value: Any) -> float | str:
    """Convert to a fraction or a column name."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1:
        return float(value)
    raise ParamError(
        f"validation={value!r}: give a fraction between 0 and 1 (0.1 holds out a tenth), the name of a 0/1 column, or"
        " None",
        param="validation",
    )


def to_run_id(value: Any) -> str:
    """Convert to a name that can be a folder in the Store."""
    if isinstance(value, str) and _NAME.fullmatch(value):
        return value
    raise ParamError(
        f"run_id={value!r}: use letters, digits, '_', '-', '.' and '=', beginning with a letter, digit or '_'",
        param="run_id",
    )


def to_compression(value: Any) -> str:
    """Convert to ``"none"`` or ``"fp16"``; Horovod's ``hvd.Compression`` classes are taken as well."""
    names = {"NoneCompressor": "none", "FP16Compressor": "fp16"}
    name = names.get(getattr(value, "__name__", ""), value)
    return str(one_of("gradient_compression", ("none", "fp16"))(name))


def to_shapes(value: Any) -> list[list[int]]:
    """Convert to a list of shapes."""
    if not isinstance(value, list | tuple) or not all(
        _is_list_of(shape, int) and all(size > 0 for size in shape) for shape in value
    ):
        raise ParamError(f"label_shapes={value!r}: give one shape per label, such as [[1], [10]]", param="label_shapes")
    return [list(shape) for shape in value]


def to_fills(value: Any) -> dict[str, Any]:
    """Convert to what stands for a null, by column."""
    if not isinstance(value, Mapping) or not all(isinstance(item, _FILLER) for item in value.values()):
        raise ParamError(
            f"fill_nulls={value!r}: give what stands for a null, by column, such as {{'age': -1, 'city': 'unknown'}}",
            param="fill_nulls",
        )
    return {str(name): item for name, item in value.items()}


def to_padding(value: Any) -> dict[str, dict[str, Any]]:
    """Convert to what arrays are padded with and to which length, by column; a length of ``None`` is the model's."""
    items = value.items() if isinstance(value, Mapping) else [(None, None)]
    converted = {
        str(name): {"length": None, **(item if isinstance(item, Mapping) else {"value": item})} for name, item in items
    }
    for item in converted.values():
        length = item["length"]
        is_length = length is None or (isinstance(length, int) and not isinstance(length, bool) and length > 0)
        if set(item) != {"value", "length"} or not isinstance(item["value"], bool | int | float) or not is_length:
            raise ParamError(
                f"padding={value!r}: give the value that fills up each column's rows, such as {{'tokens': 0}}, or"
                " {'tokens': {'value': 0, 'length': 64}}",
                param="padding",
            )
    return converted


def text_dict(name: str) -> Converter:
    """Return a converter to a dictionary of texts."""

    def convert(value: Any) -> dict[str, str]:
        if not isinstance(value, Mapping):
            raise ParamError(f"{name}={value!r}: give a dictionary", param=name)
        return {str(key): str(item) for key, item in value.items()}

    return convert


def output_types(value: Any) -> list[str | None]:
    """Convert to a list of column kinds."""
    if not isinstance(value, list | tuple):
        raise ParamError(f"output_types={value!r}: give a list with one type per output", param="output_types")
    kind = one_of("output_types", ("scalar", "vector", "array"))
    return [None if item is None else kind(item) for item in value]


def _checked(name: str, convert: Converter, accept: Callable[[Any], bool], expected: str) -> Converter:
    def converter(value: Any) -> Any:
        try:
            converted = convert(value)
        except TypeError:
            converted = None
        if converted is None or not accept(converted):
            raise ParamError(f"{name}={value!r}: give {expected}", param=name)
        return converted

    return converter


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, kind) for item in value)


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
    verbose = param("verbose", "0: silent; 1: log the phases of a fit", integer("verbose"))
    gradient_compression = param(
        "gradient_compression", "'none', or 'fp16' to send half-precision gradients", to_compression
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
    nics = param("nics", "network interfaces that the ranks may use", column_names("nics"))
    backend_env = param("backend_env", "environment variables of the training processes", text_dict("backend_env"))
