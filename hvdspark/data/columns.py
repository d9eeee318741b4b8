"""Spark's column types: what is accepted, as what it is stored, and what to do about the others."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable
from typing import Any

from pyspark.sql import types as T

from hvdspark.errors import SchemaError, closest
from hvdspark.plan import ColumnKind, ColumnSpec

_DTYPES: dict[type[T.DataType], str] = {
    T.BooleanType: "bool",
    T.ByteType: "int8",
    T.ShortType: "int16",
    T.IntegerType: "int32",
    T.LongType: "int64",
    T.FloatType: "float32",
    T.DoubleType: "float64",
}

# Spark's type of each dtype that a column can have.
NUMBERS = {dtype: data_type for data_type, dtype in _DTYPES.items()}

# What is one value per row and no number in Spark. Dates count days and timestamps microseconds since 1970, as
# unix_date() and unix_micros() do.
_SINGLE: dict[type[T.DataType], tuple[ColumnKind, str]] = {
    T.DateType: ("date", "int32"),
    T.TimestampType: ("timestamp", "int64"),
    T.TimestampNTZType: ("timestamp", "int64"),
    T.StringType: ("string", "string"),
}

# Fields of pyspark.ml.image.ImageSchema, whose module the engine does not import.
_IMAGE_FIELDS: dict[str, type[T.DataType]] = {
    "origin": T.StringType,
    "height": T.IntegerType,
    "width": T.IntegerType,
    "nChannels": T.IntegerType,
    "mode": T.IntegerType,
    "data": T.BinaryType,
}

_REMEDIES: dict[type[T.DataType], str] = {
    T.DecimalType: "cast it to double",
    T.MapType: "select the entries that are needed as columns of their own, or cast them to double",
    T.StructType: "select the fields that are needed as columns of their own",
    T.DayTimeIntervalType: "turn it into a number, for instance by cast('long') of its seconds",
    T.YearMonthIntervalType: "turn it into a number of months, for instance by cast('int')",
    T.VariantType: "take the values out of it with variant_get(), as double for instance",
    T.NullType: "cast it to the type that it is meant to have",
}

_ACCEPTED = (
    "a number, a boolean, a date or timestamp, a string, an image (binary or Spark's struct), array<number> (nested or"
    " not) or a Spark ML vector"
)


def column_spec(schema: T.StructType, name: str) -> ColumnSpec:
    """Describe one column of a DataFrame.

    Raises
    ------
    SchemaError
        When it is missing (naming the closest that exists) or of a type that is not accepted (naming the cast).
    """
    field = find_field(schema, name)
    data_type = field.dataType
    if type(data_type) in _DTYPES:
        return ColumnSpec(name, "scalar", _DTYPES[type(data_type)])
    if type(data_type) in _SINGLE:
        kind, dtype = _SINGLE[type(data_type)]
        return ColumnSpec(name, kind, dtype, storage="text" if kind == "string" else "dense")
    if isinstance(data_type, T.ArrayType) and type(_element(data_type)) in _DTYPES:
        return ColumnSpec(name, "array", _DTYPES[type(_element(data_type))], size=None)
    if is_vector(data_type):
        return ColumnSpec(name, "vector", "float64", size=_vector_size(field))
    if isinstance(data_type, T.BinaryType):
        return ColumnSpec(name, "binary", "uint8", size=None)
    if _is_image(data_type):
        return ColumnSpec(name, "image", "uint8", size=None)
    raise SchemaError(
        f"column '{name}' has type {data_type.simpleString()}; expected {_ACCEPTED}. Remedy: {_remedy(data_type)}.",
        column=name,
        expected=_ACCEPTED,
        found=data_type.simpleString(),
    )


def spark_schema(columns: Iterable[ColumnSpec]) -> T.StructType:
    """Return the schema of a DataFrame that such columns can come from."""
    return T.StructType([T.StructField(spec.name, _spark_type(spec), nullable=False) for spec in columns])


def weight_spec(schema: T.StructType, name: str) -> ColumnSpec:
    """Describe a column of row weights; raises :class:`SchemaError` unless it is one number per row."""
    spec = column_spec(schema, name)
    if spec.kind != "scalar" or spec.dtype == "bool":
        found = find_field(schema, name).dataType.simpleString()
        raise SchemaError(
            f"sample_weight_col '{name}' has type {found}; expected one number per row",
            column=name,
            expected="a number",
            found=found,
        )
    return dataclasses.replace(spec, dtype="float32")


def find_field(schema: T.StructType, name: str) -> T.StructField:
    """Return a field by name; raises :class:`SchemaError` that names the closest one."""
    if name not in schema.names:
        raise SchemaError(
            f"column '{name}' does not exist.{closest(name, schema.names)} The DataFrame has: "
            f"{', '.join(schema.names)}",
            column=name,
            expected="a column of that name",
            found=", ".join(schema.names),
        )
    if schema.names.count(name) > 1:
        raise SchemaError(
            f"there are {schema.names.count(name)} columns named '{name}'; rename or drop all but one",
            column=name,
            expected="one column of that name",
            found=f"{schema.names.count(name)} columns",
        )
    return schema[name]


def is_vector(data_type: T.DataType) -> bool:
    """Whether a type is Spark ML's (or MLlib's) vector, without importing ``pyspark.ml``."""
    return isinstance(data_type, T.UserDefinedType) and type(data_type).__name__ == "VectorUDT"


def axes_of(schema: T.StructType, name: str) -> int:
    """Count the axes of a column's rows: 0 for one value, 3 for images, ``n`` for arrays nested ``n`` deep.

    A binary counts as an image.
    """
    data_type = find_field(schema, name).dataType
    axes = 0
    while isinstance(data_type, T.ArrayType):
        axes, data_type = axes + 1, data_type.elementType
    if isinstance(data_type, T.BinaryType) or _is_image(data_type):
        return 3
    return axes + is_vector(data_type)


def _spark_type(spec: ColumnSpec) -> T.DataType:
    if spec.kind == "vector":
        # Looked up by name: the engine does not depend on Spark ML, but speaks its vector type.
        found: T.DataType = importlib.import_module("pyspark.ml.linalg").VectorUDT()
    elif spec.kind == "image":
        found = T.StructType([T.StructField(name, data_type()) for name, data_type in _IMAGE_FIELDS.items()])
    elif spec.kind == "binary":
        found = T.BinaryType()
    elif spec.kind in ("scalar", "array"):
        found = NUMBERS[spec.dtype]()
        for _ in spec.row_shape or () if spec.kind == "array" else ():
            found = T.ArrayType(found, containsNull=False)
    else:
        found = next(data_type for data_type, (kind, _) in _SINGLE.items() if kind == spec.kind)()
    return found


def _element(data_type: T.DataType) -> T.DataType:
    while isinstance(data_type, T.ArrayType):
        data_type = data_type.elementType
    return data_type


def _is_image(data_type: T.DataType) -> bool:
    return (
        isinstance(data_type, T.StructType)
        and {field.name: type(field.dataType) for field in data_type} == _IMAGE_FIELDS
    )


def _vector_size(field: T.StructField) -> int | None:
    """Read the size that VectorAssembler and its like leave in the column's metadata."""
    attributes: Any = field.metadata.get("ml_attr", {})
    size = attributes.get("num_attrs")
    return int(size) if size else None


def _remedy(data_type: T.DataType) -> str:
    if isinstance(data_type, T.ArrayType):
        element = _element(data_type)
        if isinstance(element, T.StringType):
            return "turn its elements into numbers first, or join them with array_join() for a model that takes text"
        return "turn its elements into numbers first, for instance with transform() or a cast to array<double>"
    return _REMEDIES.get(type(data_type), "select or compute columns of an accepted type")
