"""A DataFrame's columns against the model: what is stored of them, and how they fill its batches.

Everything here looks at the DataFrame's schema alone, so that bad input fails before the first Spark job.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NoReturn

import numpy as np
from pyspark.sql import types as T

from hvdspark.data.blocks import holds_all
from hvdspark.data.columns import axes_of, column_spec, find_field, weight_spec
from hvdspark.data.missing import Missing, Specs, with_lengths
from hvdspark.errors import ParamError, SchemaError
from hvdspark.plan import BatchSpec, ColumnSpec, ModelTensor, Shape, TensorSpec

FeatureCols = Sequence[str | Sequence[str]]

# Wider vectors are stored sparse, and become arrays only on the way to a batch. At this width, vectors of 64 values are
# written 8 times as fast so, read twice as fast and take half the room; vectors without a zero, such as embeddings,
# which seldom are any wider, are written and read 4 times as slowly.
SPARSE_WIDTH = 4096

# The dtypes of inputs that hold dates (days until the year 9999 are below 2**24) and timestamps (microseconds until the
# year 2255 are below 2**53). One that is later and not held is refused when it is seen.
_EXACT = {
    "date": ("int32", "int64", "uint32", "uint64", "float32", "float64"),
    "timestamp": ("int64", "uint64", "float64"),
}


def check_columns(
    schema: T.StructType,
    *,
    feature_cols: FeatureCols,
    label_cols: Sequence[str] = (),
    sample_weight_col: str | None = None,
    inputs: Sequence[ModelTensor] | None = None,
    outputs: Sequence[ModelTensor] | None = None,
    label_shapes: Sequence[Sequence[int]] | None = None,
    missing: Missing | None = None,
    sparse: bool = False,
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
    missing
        What stands for nulls and fills up short arrays; by default nothing does.
    sparse
        Store all vectors sparse, not only wide ones.

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
        For a column that is missing or of a type that the model cannot take, or whose size does not fit.
    ParamError
        When the numbers of columns and of model inputs or outputs differ, or what is to stand for missing values
        does not fit its column.
    """
    groups = [(entry,) if isinstance(entry, str) else tuple(entry) for entry in feature_cols]
    names = (*(name for group in groups for name in group), *label_cols)
    specs = {name: column_spec(schema, name) for name in names}
    if sample_weight_col is not None:
        # A column that the model is fed as well is stored as the model needs it.
        specs.setdefault(sample_weight_col, weight_spec(schema, sample_weight_col))
    specs = (missing or Missing()).apply(specs)
    features = _features(schema, groups, specs, inputs)
    labels = _labels(label_cols, specs, outputs, label_shapes)
    specs = with_lengths(specs, (*features, *labels))
    batch = BatchSpec(features, labels, sample_weight_col)
    weights = () if sample_weight_col is None else (TensorSpec((sample_weight_col,), (), "float32"),)
    tensors = (*features, *labels, *weights)
    stored = tuple(_stored(specs[name], axes_of(schema, name), tensors, sparse) for name in batch.columns)
    return stored, batch


def _features(
    schema: T.StructType,
    groups: Sequence[tuple[str, ...]],
    specs: Specs,
    inputs: Sequence[ModelTensor] | None,
) -> tuple[TensorSpec, ...]:
    if inputs is None:
        return tuple(_open_tensor(group, specs) for group in groups)
    if len(inputs) != len(groups):
        names = ", ".join(f"{tensor.name}{_show(tensor.shape)}" for tensor in inputs)
        raise ParamError(
            f"feature_cols has {len(groups)} entries, but the model has {len(inputs)} inputs: {names}. Give one entry"
            " per input; a list inside the list is concatenated into one input.",
            param="feature_cols",
        )
    return tuple(_tensor(schema, group, specs, tensor) for group, tensor in zip(groups, inputs, strict=True))


def _open_tensor(group: tuple[str, ...], specs: Specs) -> TensorSpec:
    """For a model that does not state its inputs: Keras' float32, but integers stay as they are."""
    kinds = {np.dtype(specs[name].dtype).kind for name in group if specs[name].kind != "string"}
    dtype = "float32" if kinds - set("iu") else None
    for name in group:
        if specs[name].kind == "string":
            _refuse_string(name, "the model does not state that it takes strings")
        if dtype is not None:
            _check_exact(specs[name], dtype, f"which is fed as {dtype}")
    return TensorSpec(group, dtype=dtype)


def _tensor(schema: T.StructType, group: tuple[str, ...], specs: Specs, wanted: ModelTensor) -> TensorSpec:
    """Fit a group of columns into one model input."""
    for name in group:
        _check_type(specs[name], wanted)
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
    dtype = _numpy_dtype(wanted.dtype)
    if size is not None:
        return TensorSpec(group, tuple(axis or 0 for axis in wanted.shape), dtype)
    has_axes = len(group) == 1 and axes_of(schema, group[0]) > 1
    if wanted.shape.count(None) > 1 and not has_axes:
        raise ParamError(
            f"the model's input '{wanted.name}' has the shape {_show(wanted.shape)}: of a column of numbers only one"
            " axis can be told. Give the model's input fixed axes but for one.",
            param="model",
        )
    return TensorSpec(group, None, dtype, tuple(-1 if axis is None else axis for axis in wanted.shape))


def _check_type(spec: ColumnSpec, wanted: ModelTensor) -> None:
    """Refuse a column whose values an input does not take, or not without loss."""
    takes = f"the model's input '{wanted.name}' takes {wanted.dtype}"
    if spec.kind == "string" and wanted.dtype != "string":
        _refuse_string(spec.name, takes)
    if wanted.dtype == "string" and spec.kind != "string":
        raise SchemaError(
            f"column '{spec.name}' holds {spec.dtype}, but {takes}; cast the column to string",
            column=spec.name,
            expected="string",
            found=spec.dtype,
        )
    if not wanted.dtype.startswith(("float", "bfloat", "int", "uint", "bool", "string")):
        raise SchemaError(
            f"{takes}, but columns are fed as numbers or strings: give the model an input of those",
            column=spec.name,
            expected=wanted.dtype,
            found=spec.dtype,
        )
    if wanted.dtype.startswith(("int", "uint")) and spec.dtype.startswith("float"):
        raise SchemaError(
            f"column '{spec.name}' holds {spec.dtype}, but {takes}: fractions would be cut off. Cast the column to an"
            " integer type.",
            column=spec.name,
            expected=wanted.dtype,
            found=spec.dtype,
        )
    if wanted.dtype == "bool" and spec.dtype.startswith("float"):
        raise SchemaError(
            f"column '{spec.name}' holds {spec.dtype}, but {takes}: all fractions would be True. Turn the column into a"
            f" boolean, for instance by comparing it: col('{spec.name}') > 0.5.",
            column=spec.name,
            expected=wanted.dtype,
            found=spec.dtype,
        )
    _check_exact(spec, wanted.dtype, f"but {takes}")


def _check_exact(spec: ColumnSpec, dtype: str, where: str) -> None:
    """Refuse a date or timestamp that would be rounded."""
    allowed = _EXACT.get(spec.kind)
    if allowed is None or dtype in allowed:
        return
    stored = "days since 1970 (int32)" if spec.kind == "date" else "microseconds since 1970 (int64)"
    wide = "int32 or float32" if spec.kind == "date" else "int64 or float64"
    raise SchemaError(
        f"column '{spec.name}' is a {spec.kind}, stored as {stored}, {where}, which cannot hold that exactly. Give the"
        f" model {wide}, or derive numbers from the column, such as dayofweek(), hour() or differences of"
        " unix_timestamp().",
        column=spec.name,
        expected=wide,
        found=dtype,
    )


def _refuse_string(name: str, why: str) -> NoReturn:
    raise SchemaError(
        f"column '{name}' has type string, but {why}. Turn it into numbers first, for instance with StringIndexer, or"
        " give the model an input of dtype string with a layer that looks strings up.",
        column=name,
        expected="numbers",
        found="string",
    )


def _labels(
    label_cols: Sequence[str],
    specs: Specs,
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
    return tuple(
        _label(specs[name], None if outputs is None else outputs[index], None if shapes is None else shapes[index])
        for index, name in enumerate(label_cols)
    )


def _label(spec: ColumnSpec, output: ModelTensor | None, stated: Sequence[int] | None) -> TensorSpec:
    """Fit a column to one model output."""
    given = "float32" if output is None else output.dtype
    if spec.kind == "string" and given != "string":
        _refuse_string(spec.name, "a label is compared with what the model gives, which are numbers")
    _check_exact(spec, given, f"but the model's output is {given}")
    shape = _label_shape(spec, output, stated)
    # Integer labels stay integers: sparse losses take them as class numbers.
    is_wide = spec.dtype == "float64" and _numpy_dtype(given) == "float32"
    dtype = "string" if spec.kind == "string" else "float32" if is_wide else None
    preferred = None
    if shape is None and output is not None and output.size is not None:
        preferred = tuple(axis or 0 for axis in output.shape)
    return TensorSpec((spec.name,), shape, dtype, preferred)


def _label_shape(spec: ColumnSpec, output: ModelTensor | None, stated: Sequence[int] | None) -> Shape | None:
    """Give a label the output's shape where it has as many values, else leave it to the rows."""
    if stated is not None:
        return tuple(stated)
    if output is not None and output.size is not None and spec.size == output.size:
        return tuple(axis or 0 for axis in output.shape)
    return (1,) if spec.size == 1 else None


def _stored(spec: ColumnSpec, axes: int, tensors: Iterable[TensorSpec], sparse: bool) -> ColumnSpec:
    """Decide how a column is stored, now that the tensors it fills are known."""
    mine = [tensor for tensor in tensors if spec.name in tensor.columns]
    wanted = {tensor.dtype for tensor in mine}
    if spec.dtype == "float64" and wanted and wanted <= {"float32", "float16"}:
        # Nobody asks for more.
        spec = dataclasses.replace(spec, dtype="float32")
    alone = {tensor.shape for tensor in mine if tensor.columns == (spec.name,) and tensor.shape is not None}
    shape = alone.pop() if len(alone) == 1 else None
    if spec.kind == "binary" and shape is not None:
        # Raw bytes are told from encoded images by their number.
        spec = spec.with_shape(shape)
    if spec.fill is not None and spec.size is None and axes == 1 and shape is not None:
        # There may be nothing but nulls where a task begins.
        spec = dataclasses.replace(spec, size=math.prod(shape))
    if spec.kind == "vector":
        width = spec.size if spec.size is not None else math.prod(shape or ())
        if sparse or width > SPARSE_WIDTH:
            spec = _sparse(spec)
    if spec.dtype == "string":
        return spec
    narrow = {dtype for dtype in wanted - {None, "string"} if dtype is not None and not holds_all(dtype, spec.dtype)}
    return dataclasses.replace(spec, fed_as=tuple(sorted(narrow)))


def _sparse(spec: ColumnSpec) -> ColumnSpec:
    if spec.fill:
        raise ParamError(
            f"fill_nulls={{'{spec.name}': {spec.fill!r}}}: the column's vectors are stored sparse; give 0, or fill them"
            " in the DataFrame",
            param="fill_nulls",
        )
    return dataclasses.replace(spec, storage="sparse")


def _numpy_dtype(name: str) -> str:
    """Name the dtype that a rank feeds: NumPy has no bfloat16, and Keras casts float32 itself."""
    return "float32" if name in ("bfloat16", "float16") else name


def _show(shape: Sequence[int | None]) -> str:
    return "(" + ", ".join("?" if axis in (None, -1) else str(axis) for axis in shape) + ")"


def resolve(batch: BatchSpec, columns: Sequence[ColumnSpec]) -> BatchSpec:
    """Give every tensor its shape, now that all columns' shapes are known.

    Raises
    ------
    SchemaError
        When the columns hold another number of values than the model takes, or have other axes.
    """
    specs = {spec.name: spec for spec in columns}
    return dataclasses.replace(
        batch,
        features=tuple(_resolved(tensor, specs) for tensor in batch.features),
        labels=tuple(_resolved(tensor, specs) for tensor in batch.labels),
    )


def _resolved(tensor: TensorSpec, specs: Specs) -> TensorSpec:
    found = specs[tensor.columns[0]].row_shape
    if len(tensor.columns) > 1 or found is None:
        found = (sum(specs[name].size or 0 for name in tensor.columns),)
    shape = tensor.shape_for(found)
    if shape is None and (tensor.shape is not None or tensor.has_open_axis):
        held = f"{math.prod(found)} values per row" + (f" (shape {_show(found)})" if len(found) > 1 else "")
        if tensor.shape is not None:
            wanted = f"but the model takes {tensor.size} (shape {_show(tensor.shape)})"
        else:
            wanted = f"which do not fill the model's shape {_show(tensor.preferred_shape or ())}"
        raise SchemaError(
            f"the columns {', '.join(tensor.columns)} hold {held}, {wanted}",
            column=tensor.columns[0],
            expected=_show(tensor.shape or tensor.preferred_shape or ()),
            found=_show(found),
        )
    return dataclasses.replace(tensor, shape=found if shape is None else shape)


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
