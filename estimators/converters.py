"""Converters of parameters: each gives a value that JSON can hold, or raises an error that says what to give."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pyspark.ml.param import TypeConverters

from hvdspark.errors import ParamError, closest
from hvdspark.store import _NAME

Converter = Callable[[Any], Any]

# What may stand for a null: a JSON value.
_FILLER = bool | int | float | str


def positive_int(name: str) -> Converter:
    """Return a converter to an integer of at least one."""
    return _checked(name, TypeConverters.toInt, lambda value: value >= 1, "an integer of at least 1")


def non_negative_int(name: str) -> Converter:
    """Return a converter to an integer of at least zero."""
    return _checked(name, TypeConverters.toInt, lambda value: value >= 0, "an integer of at least 0")


def positive_float(name: str) -> Converter:
    """Return a converter to a number above zero."""
    return _checked(name, TypeConverters.toFloat, lambda value: 0 < value < math.inf, "a number above 0")


def zero_or_at_least(name: str, least: float) -> Converter:
    """Return a converter to zero, or a number that is no smaller than another."""
    return _checked(
        name,
        TypeConverters.toFloat,
        lambda value: value == 0 or least <= value < math.inf,
        f"0 or a number of at least {least:g}",
    )


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


def boolean_or(name: str, other: str) -> Converter:
    """Return a converter to a boolean, or to the one word that is allowed beside it."""

    def convert(value: Any) -> bool | str:
        if value == other or isinstance(value, bool):
            return value  # type: ignore[no-any-return]
        raise ParamError(f"{name}={value!r}: give True, False or {other!r}", param=name)

    return convert


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
