"""Batched scoring: Arrow batches in, the same batches with output columns out. Lazy, and without a probe job."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa

from hvdspark.data.arrays import fill_tensor, from_array, to_block
from hvdspark.data.blocks import Block, late_slices
from hvdspark.errors import ParamError, SchemaError
from hvdspark.plan import ColumnKind, ColumnSpec, ModelTensor, TensorSpec

if TYPE_CHECKING:
    from pyspark import Broadcast
    from pyspark.sql import DataFrame
    from pyspark.sql import types as T


class Scorer(Protocol):
    """Maps the model's input tensors, each of shape ``(rows, …)``, to its output tensors."""

    def __call__(self, inputs: Sequence[Block]) -> Sequence[Block]:
        """Score one batch."""
        ...


@dataclass(frozen=True)
class OutputColumn:
    """A column that scoring appends.

    Parameters
    ----------
    name
        Name of the column.
    kind
        ``"scalar"``, ``"vector"`` (Spark ML vector) or ``"array"``.
    shape
        Shape of one row's output.
    dtype
        NumPy dtype of the values in the column. A vector holds ``float64`` always, as Spark's vectors do.
    """

    name: str
    kind: ColumnKind
    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True)
class ScorePlan:
    """How rows become model inputs and outputs become columns.

    Parameters
    ----------
    columns
        The columns that are read, as they are in the DataFrame.
    features
        The model's inputs.
    outputs
        The columns to append.
    batch_rows
        Rows per call of the model at most: of images and sparse vectors only as many are made dense as take little
        memory.
    loader
        Address ``"package.module:function"`` of the function that makes a :class:`Scorer` from the payload.
    key
        Identifies the payload; a Python worker keeps the scorers of a few keys for its later tasks.
    """

    columns: tuple[ColumnSpec, ...]
    features: tuple[TensorSpec, ...]
    outputs: tuple[OutputColumn, ...]
    batch_rows: int
    loader: str
    key: str


def output_columns(
    names: Sequence[str], outputs: Sequence[ModelTensor], kinds: Sequence[str | None]
) -> tuple[OutputColumn, ...]:
    """Decide what each model output becomes.

    Parameters
    ----------
    names
        One column name per output.
    outputs
        What the model gives.
    kinds
        The user's choice for each output, or ``None``: one value per row becomes a number, a row of values a Spark ML
        vector (as Spark's own models give), anything more a nested array. Floating-point scalars become ``double``, the
        type that Spark's evaluators take.

    Raises
    ------
    ParamError
        When the numbers of names and outputs differ, or a kind does not fit the output's shape.
    """
    if len(names) != len(outputs):
        raise ParamError(
            f"output_cols has {len(names)} names, but the model has {len(outputs)} outputs; give one name per output",
            param="output_cols",
        )
    return tuple(_output_column(name, tensor, kind) for name, tensor, kind in zip(names, outputs, kinds, strict=True))


def _output_column(name: str, tensor: ModelTensor, wanted: str | None) -> OutputColumn:
    is_float = tensor.dtype.startswith(("float", "bfloat"))
    if wanted not in (None, "scalar", "vector", "array"):
        raise ParamError(
            f"output type '{wanted}' of '{name}' is not known; choose 'scalar', 'vector' or 'array'",
            param="output_types",
        )
    if wanted == "scalar" and tensor.size not in (1, None):
        raise ParamError(
            f"'{name}' cannot be a scalar: the model gives {tensor.size} values per row", param="output_types"
        )
    if wanted is not None:
        kind: Any = wanted
    elif tensor.size == 1 and len(tensor.shape) <= 1:
        kind = "scalar"
    else:
        kind = "vector" if len(tensor.shape) == 1 and is_float else "array"
    doubles = kind == "vector" or (is_float and (kind == "scalar" or tensor.dtype == "float64"))
    dtype = "float64" if doubles else "float32" if is_float else tensor.dtype
    return OutputColumn(name, kind, tensor.shape, dtype)


def scored_schema(schema: T.StructType, outputs: Sequence[OutputColumn]) -> T.StructType:
    """Append the output columns to a schema.

    Raises
    ------
    SchemaError
        When a column of that name is there already.
    """
    from pyspark.sql import types as T

    fields = list(schema.fields)
    # Spark does not tell names apart by case, unless it is asked to.
    taken = {name.lower() for name in schema.names}
    for output in outputs:
        if output.name.lower() in taken:
            raise SchemaError(
                f"the output column '{output.name}' exists already; choose another name with setOutputCols([…]), or"
                " drop the column first",
                column=output.name,
                expected="a new column",
                found="a column of that name",
            )
        taken.add(output.name.lower())
        fields.append(T.StructField(output.name, _spark_type(output), nullable=False))
    return T.StructType(fields)


def _spark_type(output: OutputColumn) -> Any:
    from pyspark.sql import types as T

    from hvdspark.data.columns import NUMBERS

    if output.dtype not in NUMBERS:
        raise ParamError(
            f"the model's output for '{output.name}' has dtype {output.dtype}, which no column type holds",
            param="output_cols",
        )
    if output.kind == "vector":
        # Looked up by name: the engine does not depend on Spark ML, but speaks its vector type.
        return importlib.import_module("pyspark.ml.linalg").VectorUDT()
    found: Any = NUMBERS[output.dtype]()
    if output.kind == "array":
        for _ in output.shape or (1,):
            found = T.ArrayType(found, containsNull=False)
    return found


def score(df: DataFrame, plan: ScorePlan, payload: Broadcast[bytes]) -> DataFrame:
    """Append a model's outputs to a DataFrame.

    Parameters
    ----------
    df
        The rows; all columns are kept.
    plan
        What to read and what to append.
    payload
        What the plan's loader makes the model of; it travels once to each executor.

    Returns
    -------
    DataFrame
        Lazy: nothing runs until somebody asks for rows.
    """
    schema = scored_schema(df.schema, plan.outputs)
    # By position: PySpark takes a name with dots for an access to a field.
    rows = df.toDF(*[f"c{place}" for place in range(len(df.columns))])
    return rows.mapInArrow(_task_of(plan, payload, df.columns), schema)


def _task_of(
    plan: ScorePlan, payload: Broadcast[bytes], names: Sequence[str]
) -> Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """Make the function that Spark calls with a partition's batches, whose columns come in the order of the names."""

    def task(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for batch in batches:
            if batch.num_rows:
                scored = score_batch(batch.rename_columns(list(names)), plan, _scorer(plan, payload))
                # Spark goes by position, but cannot take two columns of one name out of a batch.
                yield scored.rename_columns([f"c{place}" for place in range(scored.num_columns)])
        _spare_from_collection()

    return task


@dataclass
class _Kept:
    """A scorer of this Python worker, the size of its payload, and whether collections of garbage pass it over."""

    scorer: Scorer
    size_bytes: int
    is_spared: bool = False


# A Pipeline may score with several models, and its workers serve any of its stages. But models are large.
MAX_SCORERS, MAX_PAYLOAD_BYTES = 4, 512 << 20

# By the key of the payload; the one used last is the last.
_kept: dict[str, _Kept] = {}


def _scorer(plan: ScorePlan, payload: Broadcast[bytes]) -> Scorer:
    """Make the scorer, or take the one that an earlier task of this Python worker made."""
    kept = _kept.pop(plan.key, None)
    if kept is None:
        _make_room(len(payload.value))
        kept = _Kept(_load(plan.loader, payload), len(payload.value))
    _kept[plan.key] = kept
    return kept.scorer


def _make_room(size_bytes: int) -> None:
    """Give up the scorers that were not used for longest, so that another of this size can be kept beside the rest."""
    is_garbage = False
    while _kept and (
        len(_kept) >= MAX_SCORERS or size_bytes + sum(kept.size_bytes for kept in _kept.values()) > MAX_PAYLOAD_BYTES
    ):
        del _kept[next(iter(_kept))]
        is_garbage = True
    if is_garbage:
        # For the next collection to find.
        gc.unfreeze()
        for kept in _kept.values():
            kept.is_spared = False


def _load(loader: str, payload: Broadcast[bytes]) -> Scorer:
    """Make a scorer. What it imports stays: looking for garbage among it takes a fifth of the time and finds none."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        module, _, name = loader.partition(":")
        scorer: Scorer = getattr(importlib.import_module(module), name)(payload.value)
        return scorer
    finally:
        if was_enabled:
            gc.enable()


def _spare_from_collection() -> None:
    """Leave what is in this process by now out of later collections of garbage.

    PySpark's daemon collects after every task, which takes 0.1 to 0.2 s where TensorFlow is in the process. Done at the
    end of a scorer's first task, when it has compiled what it will call.
    """
    if not all(kept.is_spared for kept in _kept.values()):
        gc.collect()
        gc.freeze()
        for kept in _kept.values():
            kept.is_spared = True


def score_batch(batch: pa.RecordBatch, plan: ScorePlan, scorer: Scorer) -> pa.RecordBatch:
    """Append the outputs of one batch.

    Raises
    ------
    DataError
        When a feature cannot be given to the model.
    """
    blocks = {spec.name: to_block(batch.column(spec.name), spec) for spec in plan.columns}
    parts = []
    for rows in late_slices(blocks, plan.batch_rows):
        piece = {name: block[rows] for name, block in blocks.items()}
        parts.append(scorer([fill_tensor(piece, tensor) for tensor in plan.features]))
    columns, names = list(batch.columns), list(batch.schema.names)
    for index, output in enumerate(plan.outputs):
        values = np.concatenate([np.asarray(part[index]) for part in parts])
        columns.append(from_array(values.astype(output.dtype, copy=False), output.kind))
        names.append(output.name)
    return pa.RecordBatch.from_arrays(columns, names=names)
