"""What stands for values that are not there: for nulls, and at the end of short arrays. Nothing does unless asked.

All of it is checked against the columns' types before any Spark job.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import numpy as np

from hvdspark.errors import ParamError, closest
from hvdspark.plan import ColumnSpec, Filler, TensorSpec

Specs = dict[str, ColumnSpec]
Moment = TypeVar("Moment", datetime.date, datetime.datetime)


@dataclass(frozen=True)
class Padding:
    """How short arrays are filled up.

    Parameters
    ----------
    value
        What comes behind a row's values.
    length
        Values per row; ``None`` takes the length of the model's input.
    """

    value: Filler = 0
    length: int | None = None


@dataclass(frozen=True)
class Missing:
    """What is missing and may be.

    Parameters
    ----------
    fills
        What stands for a null, by column.
    padding
        How short arrays are filled up, by column.
    """

    fills: Mapping[str, Filler] = field(default_factory=dict)
    padding: Mapping[str, Padding] = field(default_factory=dict)

    @classmethod
    def from_params(cls, fills: Mapping[str, Any] | None, padding: Mapping[str, Any] | None) -> Missing:
        """Read the JSON values of the parameters ``fill_nulls`` and ``padding``."""
        return cls(dict(fills or {}), {name: Padding(**value) for name, value in (padding or {}).items()})

    def only(self, names: Iterable[str]) -> Missing:
        """Leave out all columns but some."""
        kept = set(names)
        fills = {name: value for name, value in self.fills.items() if name in kept}
        return Missing(fills, {name: value for name, value in self.padding.items() if name in kept})

    def apply(self, specs: Specs) -> Specs:
        """Note in the columns' specs what stands for what is missing.

        Raises
        ------
        ParamError
            For a column that is not used, or a value that its type cannot hold.
        """
        found = dict(specs)
        for param, values in (("fill_nulls", self.fills), ("padding", self.padding)):
            for name in values:
                if name not in specs:
                    raise ParamError(
                        f"{param} names the column '{name}', which is neither feature, label nor weight."
                        f"{closest(name, specs)}",
                        param=param,
                    )
        for name, value in self.fills.items():
            found[name] = dataclasses.replace(found[name], fill=_fill_for(found[name], value))
        for name, padding in self.padding.items():
            if found[name].kind != "array":
                raise ParamError(
                    f"padding names the column '{name}', which is no array of numbers (kind: {found[name].kind})",
                    param="padding",
                )
            value = _number_for(found[name], padding.value, "padding")
            found[name] = dataclasses.replace(found[name], padding=value, size=padding.length)
        return found


def with_lengths(specs: Specs, tensors: Iterable[TensorSpec]) -> Specs:
    """Give padded columns the length that the model's inputs leave for them, where none was stated.

    Raises
    ------
    ParamError
        When they leave none.
    """
    tensors = tuple(tensors)
    found = dict(specs)
    for name, spec in specs.items():
        if spec.padding is None or spec.size is not None:
            continue
        lengths = {_room_for(name, specs, tensor) for tensor in tensors if name in tensor.columns}
        length = lengths.pop() if len(lengths) == 1 else None
        if not length:
            raise ParamError(
                f"padding of '{name}' has no length, and the model's input does not tell one; give"
                f" padding={{'{name}': {{'value': {spec.padding!r}, 'length': 64}}}}",
                param="padding",
            )
        found[name] = dataclasses.replace(spec, size=length)
    return found


def _room_for(name: str, specs: Specs, tensor: TensorSpec) -> int | None:
    """Count the values of a tensor that its other columns leave."""
    others = [specs[other].size for other in tensor.columns if other != name]
    if tensor.size is None or None in others:
        return None
    return tensor.size - sum(size or 0 for size in others)


def _fill_for(spec: ColumnSpec, value: Filler) -> Filler:
    """Give a fill the column's own type."""
    if spec.kind in ("binary", "image"):
        raise ParamError(
            f"fill_nulls names the column '{spec.name}', but nothing stands for an image; drop the rows without one",
            param="fill_nulls",
        )
    if spec.kind == "string":
        return value if isinstance(value, str) else _refuse("fill_nulls", spec, value, "a text")
    if spec.kind == "date" and isinstance(value, str):
        return (_parsed(spec, value, datetime.date.fromisoformat) - datetime.date(1970, 1, 1)).days
    if spec.kind == "timestamp" and isinstance(value, str):
        return _micros(_parsed(spec, value, datetime.datetime.fromisoformat))
    return _number_for(spec, value, "fill_nulls")


def _parsed(spec: ColumnSpec, value: str, parse: Callable[[str], Moment]) -> Moment:
    try:
        return parse(value)
    except ValueError:
        return _refuse(
            "fill_nulls", spec, value, f"a {spec.kind} as in ISO 8601, such as 2024-01-31, or a whole number"
        )


def _micros(moment: datetime.datetime) -> int:
    """Count microseconds since 1970; a moment without a zone is one of UTC."""
    zoned = moment if moment.tzinfo is not None else moment.replace(tzinfo=datetime.UTC)
    return (zoned - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)) // datetime.timedelta(microseconds=1)


def _number_for(spec: ColumnSpec, value: Filler, param: str) -> Filler:
    """Return a number as the column's dtype has it."""
    dtype = np.dtype(spec.dtype)
    if isinstance(value, str):
        return _refuse(param, spec, value, f"a number that {dtype} holds")
    if dtype.kind == "b":
        return bool(value) if value in (0, 1) else _refuse(param, spec, value, "True or False")
    if dtype.kind == "f":
        fits = not math.isfinite(value) or abs(value) <= float(np.finfo(dtype).max)
        return float(value) if fits else _refuse(param, spec, value, f"a number that {dtype} holds")
    limits = np.iinfo(dtype)
    fits = (
        not isinstance(value, bool)
        and math.isfinite(value)
        and value == math.floor(value)
        and limits.min <= value <= limits.max
    )
    return int(value) if fits else _refuse(param, spec, value, f"a whole number that {dtype} holds")


def _refuse(param: str, spec: ColumnSpec, value: Filler, expected: str) -> NoReturn:
    raise ParamError(
        f"{param}={{'{spec.name}': {value!r}}}: the column is a {spec.kind} of {spec.dtype}; give {expected}",
        param=param,
    )
