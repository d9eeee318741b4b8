"""Spark columns to stored columns: what is accepted, as what it is stored, and how it fills the model.

Everything here looks at the DataFrame's schema alone, so that bad input fails before the first Spark job.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from pyspark.sql import types as T

from hvdspark.errors import ParamError, SchemaError, closest
from hvdspark.plan import BatchSpec, ColumnSpec, ModelTensor, TensorSpec

FeatureCols = Sequence[str | Sequence[str]]

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

_REMEDIES: dict[type[T.DataType], str] = {
    T.DecimalType: "cast it to double",
    T.StringType: "turn it into numbers first, for instance with StringIndexer",
    T.DateType: "derive numbers from it, for instance with dayofyear() or unix_date()",
    T.TimestampType: "derive numbers from it, for instance with unix_timestamp()",
    T.BinaryType: "decode it into array<float> first",
    T.MapType: "select the entries that are needed as columns of their own",
    T.StructType: "select the fields that are needed as columns of their own",
}

_ACCEPTED = "a number, a boolean, array<number> or a Spark ML vector"


def check_columns(
    schema: T.StructType,
    *,
    feature_cols: FeatureCols,
    label_cols: Sequence[str] = (),
    sample_weight_col: str | None = None,
    inputs: Sequence[ModelTensor] | None = None,
    outputs: Sequence[ModelTensor] | None = None,
    label_shapes: Sequence[Sequence[int]] | None = None,
) -> tuple[tuple[ColumnSpec, ...], BatchSpec]:
    """Check a DataFrame's columns against the model and plan how they fill its batches.

    Parameters
    ----------
    schema
        The DataFrame's schema.
    feature_cols
        One entry per model input: a column, or a list of columns that are concatenated.
    label_cols
        One column per model output.
    sample_weight_col
        Numeric column with each row's weight.
    inputs, outputs
        What the model takes and gives; ``None`` for a model that is built only by its first batch.
    label_shapes
        Shape of each label, where it is neither the column's own nor that of the output.

    Returns
    -------
    columns : tuple of ColumnSpec
        The columns to store. ``float64`` becomes ``float32`` exactly where every tensor it fills is ``float32``
        or narrower.
    batch : BatchSpec
        How they make up a batch.

    Raises
    ------
    SchemaError
        For a column that is missing or of a type that no model can take, or whose size does not fit.
    ParamError
        When the numbers of columns and of model inputs or outputs differ.
    """
    groups = [(entry,) if isinstance(entry, str) else tuple(entry) for entry in feature_cols]
    specs = {name: column_spec(schema, name) for group in groups for name in group}
    specs |= {name: column_spec(schema, name) for name in label_cols}
    features = _tensors("feature_cols", groups, specs, inputs)
    labels = _labels(label_cols, specs, outputs, label_shapes)
    if sample_weight_col is not None:
        # A column that the model is fed as well is stored as the model needs it.
        specs.setdefault(sample_weight_col, weight_spec(schema, sample_weight_col))
    batch = BatchSpec(features, labels, sample_weight_col)
    return tuple(_narrow(specs[name], (*features, *labels)) for name in batch.columns), batch


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
    if isinstance(data_type, T.ArrayType) and type(data_type.elementType) in _DTYPES:
        return ColumnSpec(name, "array", _DTYPES[type(data_type.elementType)], size=None)
    if is_vector(data_type):
        return ColumnSpec(name, "vector", "float64", size=_vector_size(field))
    raise SchemaError(
        f"column '{name}' has type {data_type.simpleString()}; expected {_ACCEPTED}. Remedy: {_remedy(data_type)}.",
        column=name,
        expected=_ACCEPTED,
        found=data_type.simpleString(),
    )


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


def _vector_size(field: T.StructField) -> int | None:
    """Read the size that VectorAssembler and its like leave in the column's metadata."""
    attributes: Any = field.metadata.get("ml_attr", {})
    size = attributes.get("num_attrs")
    return int(size) if size else None


def _remedy(data_type: T.DataType) -> str:
    if isinstance(data_type, T.ArrayType):
        if isinstance(data_type.elementType, T.ArrayType):
            return "flatten it into array<number>, for instance with flatten()"
        return "turn its elements into numbers first, for instance with transform() or a cast to array<double>"
    return _REMEDIES.get(type(data_type), "select or compute columns of an accepted type")


def _tensors(
    param: str,
    groups: Sequence[tuple[str, ...]],
    specs: dict[str, ColumnSpec],
    wanted: Sequence[ModelTensor] | None,
) -> tuple[TensorSpec, ...]:
    if wanted is None:
        return tuple(TensorSpec(group, dtype=_open_dtype(group, specs)) for group in groups)
    if len(wanted) != len(groups):
        names = ", ".join(f"{tensor.name}{_show(tensor.shape)}" for tensor in wanted)
        raise ParamError(
            f"{param} has {len(groups)} entries, but the model has {len(wanted)} inputs: {names}. Give one entry per"
            " input; a list inside the list is concatenated into one input.",
            param=param,
        )
    return tuple(_tensor(group, specs, tensor) for group, tensor in zip(groups, wanted, strict=True))


def _tensor(group: tuple[str, ...], specs: dict[str, ColumnSpec], wanted: ModelTensor) -> TensorSpec:
    """Fit a group of columns into one model input."""
    if not wanted.dtype.startswith(("float", "bfloat", "int", "uint", "bool")):
        raise SchemaError(
            f"the model's input '{wanted.name}' takes {wanted.dtype}, but columns are fed as numbers: turn them into"
            " numbers in the DataFrame, and give the model a numeric input",
            column=group[0],
            expected=wanted.dtype,
            found=specs[group[0]].dtype,
        )
    sizes = [specs[name].size for name in group]
    known = [size for size in sizes if size is not None]
    size = wanted.size
    if size is not None:
        too_many = sum(known) > size
        if too_many or (len(known) == len(sizes) and sum(known) != size):
            raise SchemaError(
                f"the columns {', '.join(group)} hold {sum(known)} values per row, but the model's input"
                f" '{wanted.name}' takes {size} (shape {_show(wanted.shape)})",
                column=group[0],
                expected=f"{size} values",
                found=f"{sum(known)} values",
            )
    for name in group:
        if wanted.dtype.startswith(("int", "uint")) and specs[name].dtype.startswith("float"):
            raise SchemaError(
                f"column '{name}' holds {specs[name].dtype}, but the model's input '{wanted.name}' takes"
                f" {wanted.dtype}: fractions would be cut off. Cast the column to an integer type.",
                column=name,
                expected=wanted.dtype,
                found=specs[name].dtype,
            )
    dtype = _numpy_dtype(wanted.dtype)
    if size is not None:
        return TensorSpec(group, tuple(axis or 0 for axis in wanted.shape), dtype)
    if wanted.shape.count(None) > 1:
        raise ParamError(
            f"the model's input '{wanted.name}' has the shape {_show(wanted.shape)}: of a column of numbers only one"
            " axis can be told. Give the model's input fixed axes but for one.",
            param="model",
        )
    return TensorSpec(group, None, dtype, tuple(-1 if axis is None else axis for axis in wanted.shape))


def _labels(
    label_cols: Sequence[str],
    specs: dict[str, ColumnSpec],
    outputs: Sequence[ModelTensor] | None,
    shapes: Sequence[Sequence[int]] | None,
) -> tuple[TensorSpec, ...]:
    if outputs is not None and label_cols and len(outputs) != len(label_cols):
        raise ParamError(
            f"label_cols has {len(label_cols)} entries, but the model has {len(outputs)} outputs:"
            f" {', '.join(tensor.name for tensor in outputs)}. Give one label per output.",
            param="label_cols",
        )
    if shapes is not None and len(shapes) != len(label_cols):
        raise ParamError(
            f"label_shapes has {len(shapes)} entries for {len(label_cols)} label_cols; give one shape per label",
            param="label_shapes",
        )
    labels = []
    for index, name in enumerate(label_cols):
        output = outputs[index] if outputs is not None else None
        dtype = _numpy_dtype(output.dtype) if output is not None else "float32"
        shape = _label_shape(specs[name], output, shapes[index] if shapes is not None else None)
        # Integer labels stay integers: sparse losses take them as class numbers.
        wide = specs[name].dtype == "float64" and dtype == "float32"
        preferred = None
        if shape is None and output is not None and output.size is not None:
            preferred = tuple(axis or 0 for axis in output.shape)
        labels.append(TensorSpec((name,), shape, "float32" if wide else None, preferred))
    return tuple(labels)


def _label_shape(spec: ColumnSpec, output: ModelTensor | None, stated: Sequence[int] | None) -> tuple[int, ...] | None:
    """Give a label the output's shape where it has as many values, else leave it flat."""
    if stated is not None:
        return tuple(stated)
    if output is not None and output.size is not None and spec.size == output.size:
        return tuple(axis or 0 for axis in output.shape)
    return (1,) if spec.size == 1 else None


def _open_dtype(group: Iterable[str], specs: dict[str, ColumnSpec]) -> str | None:
    """For a model that does not state its input's dtype: Keras' float32, but integers stay as they are."""
    kinds = {np.dtype(specs[name].dtype).kind for name in group}
    return "float32" if kinds - set("iu") else None


def _narrow(spec: ColumnSpec, tensors: Iterable[TensorSpec]) -> ColumnSpec:
    """Store float64 as float32 where nobody asks for more."""
    wanted = {tensor.dtype for tensor in tensors if spec.name in tensor.columns}
    if spec.dtype == "float64" and wanted and wanted <= {"float32", "float16"}:
        return dataclasses.replace(spec, dtype="float32")
    return spec


def _numpy_dtype(name: str) -> str:
    """Name the dtype that a rank feeds: NumPy has no bfloat16, and Keras casts float32 itself."""
    return "float32" if name in ("bfloat16", "float16") else name


def _show(shape: Sequence[int | None]) -> str:
    return "(" + ", ".join("?" if axis is None else str(axis) for axis in shape) + ")"


def resolve(batch: BatchSpec, columns: Sequence[ColumnSpec]) -> BatchSpec:
    """Give every tensor its shape, now that all columns' sizes are known.

    Raises
    ------
    SchemaError
        When the columns hold another number of values than the model takes.
    """
    specs = {spec.name: spec for spec in columns}

    def shaped(tensor: TensorSpec) -> TensorSpec:
        size = sum(specs[name].size or 0 for name in tensor.columns)
        if tensor.size not in (None, size):
            raise SchemaError(
                f"the columns {', '.join(tensor.columns)} hold {size} values per row, but the model takes {tensor.size}"
                f" (shape {_show(tensor.shape or ())})",
                column=tensor.columns[0],
                expected=f"{tensor.size} values",
                found=f"{size} values",
            )
        if tensor.shape is not None:
            return tensor
        shape = tensor.shape_for(size)
        if shape is None and tensor.preferred_shape is not None and -1 in tensor.preferred_shape:
            wanted = _show([None if axis == -1 else axis for axis in tensor.preferred_shape])
            raise SchemaError(
                f"the columns {', '.join(tensor.columns)} hold {size} values per row, which do not fill the model's"
                f" shape {wanted}",
                column=tensor.columns[0],
                expected=f"a shape {wanted}",
                found=f"{size} values",
            )
        return dataclasses.replace(tensor, shape=shape or (size,))

    return dataclasses.replace(
        batch,
        features=tuple(shaped(tensor) for tensor in batch.features),
        labels=tuple(shaped(tensor) for tensor in batch.labels),
    )


def split_condition(schema: T.StructType, validation: float | str | None) -> str | None:
    """Check ``validation`` and return the name of its column, where it names one.

    Raises
    ------
    ParamError
        For a fraction outside ``(0, 1)``.
    SchemaError
        For a column that is missing or holds anything but numbers or booleans.
    """
    if validation is None or isinstance(validation, float | int):
        if validation is not None and not 0 < float(validation) < 1:
            raise ParamError(
                f"validation={validation} is no fraction between 0 and 1; give one (0.1 holds out a tenth), the name"
                " of a 0/1 column, or None",
                param="validation",
            )
        return None
    spec = column_spec(schema, validation)
    if spec.kind != "scalar":
        found = find_field(schema, validation).dataType.simpleString()
        raise SchemaError(
            f"validation column '{validation}' has type {found}; expected 0/1 numbers or booleans",
            column=validation,
            expected="0/1 or boolean",
            found=found,
        )
    return validation
