"""Scoring a batch with a model that is plain Python, and the schema that it promises."""

from __future__ import annotations

import datetime
import decimal
import gc
import sys
import types
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from pyspark.ml.linalg import VectorUDT
from pyspark.sql import types as T

from hvdspark import predict
from hvdspark.data.vectors import VECTOR_TYPE
from hvdspark.errors import NullValueError, ParamError, RaggedArrayError, SchemaError
from hvdspark.plan import ColumnKind, ColumnSpec, ModelTensor, TensorSpec
from hvdspark.predict import OutputColumn, ScorePlan, output_columns, score_batch, scored_schema

Block = npt.NDArray[Any]

X = ColumnSpec("x", "scalar", "float32")
V = ColumnSpec("v", "array", "float64", None)


def out(
    name: str = "y", kind: ColumnKind = "scalar", shape: tuple[int | None, ...] = (1,), dtype: str = "float64"
) -> Any:
    return OutputColumn(name, kind, shape, dtype)


def plan(
    outputs: Sequence[OutputColumn],
    columns: Sequence[ColumnSpec] = (X,),
    features: Sequence[TensorSpec] = (TensorSpec(("x",), (1,), "float32"),),
    batch_rows: int = 100,
) -> ScorePlan:
    return ScorePlan(tuple(columns), tuple(features), tuple(outputs), batch_rows, "unused:unused", "key")


def twice(inputs: Sequence[Block]) -> list[Block]:
    return [inputs[0] * 2]


FULL = pa.RecordBatch.from_pydict(
    {
        "x": pa.array([1.0, 2.0, 3.0], pa.float32()),
        "text": ["a", None, "ü"],
        "amount": pa.array([decimal.Decimal("1.10"), None, decimal.Decimal("-3.00")], pa.decimal128(10, 2)),
        "when": pa.array([datetime.datetime(2020, 1, 1), None, datetime.datetime(1960, 1, 1)], pa.timestamp("us")),
        "tags": pa.array([["a"], [], None], pa.list_(pa.string())),
        "pairs": pa.array([[("k", 1)], [], None], pa.map_(pa.string(), pa.int32())),
        "inner": pa.array([{"a": 1}, None, {"a": None}], pa.struct([("a", pa.int64())])),
        "raw": pa.array([b"\x00", None, b""], pa.binary()),
        "nothing": pa.nulls(3),
    }
)


def test_all_input_columns_are_kept_as_they_are_and_in_their_order() -> None:
    scored = score_batch(FULL, plan([out()]), twice)
    assert scored.schema.names == [*FULL.schema.names, "y"]
    assert scored.select(FULL.schema.names).equals(FULL)
    assert scored["y"].to_pylist() == [2.0, 4.0, 6.0]


def test_a_batch_that_is_a_slice_gives_the_rows_of_the_slice() -> None:
    scored = score_batch(FULL.slice(1, 2), plan([out()]), twice)
    assert scored["y"].to_pylist() == [4.0, 6.0]
    assert scored["text"].to_pylist() == [None, "ü"]


@pytest.mark.parametrize("batch_rows", [1, 2, 3, 4, 7, 100])
def test_the_model_sees_batches_of_the_size_asked_for_and_every_row_once(batch_rows: int) -> None:
    seen: list[int] = []

    def watch(inputs: Sequence[Block]) -> list[Block]:
        seen.append(len(inputs[0]))
        return [inputs[0] + 1]

    batch = pa.RecordBatch.from_pydict({"x": pa.array(np.arange(7), pa.float32())})
    scored = score_batch(batch, plan([out()], batch_rows=batch_rows), watch)
    assert scored["y"].to_pylist() == [1, 2, 3, 4, 5, 6, 7]
    assert sum(seen) == 7
    assert all(rows == batch_rows for rows in seen[:-1])


@pytest.mark.parametrize("dtype", ["bool", "int8", "int16", "int32", "int64", "float32", "float64"])
def test_numbers_have_the_dtype_that_was_promised(dtype: str) -> None:
    scored = score_batch(FULL, plan([out(dtype=dtype)]), lambda inputs: [np.array([[0], [1], [0]], "float16")])
    assert scored["y"].type == pa.from_numpy_dtype(np.dtype(dtype))
    assert scored["y"].to_numpy(zero_copy_only=False).tolist() == [0, 1, 0]


@pytest.mark.parametrize("values", [np.zeros((3, 1)), np.zeros(3)], ids=["(rows, 1)", "(rows,)"])
def test_a_number_may_come_with_or_without_an_axis_of_its_own(values: Block) -> None:
    assert score_batch(FULL, plan([out()]), lambda inputs: [values])["y"].to_pylist() == [0.0] * 3


def test_vectors_are_spark_vectors_of_doubles() -> None:
    values = np.array([[1, 2], [3, 4], [5, 6]], "float32")
    scored = score_batch(FULL, plan([out(kind="vector", shape=(2,))]), lambda inputs: [values])
    assert scored["y"].type == VECTOR_TYPE
    assert [row["values"] for row in scored["y"].to_pylist()] == values.tolist()
    assert [row["type"] for row in scored["y"].to_pylist()] == [1, 1, 1]


@pytest.mark.parametrize("shape", [(2,), (2, 3), (1,), (1, 1), (2, 1, 2)])
def test_arrays_are_nested_as_the_output_is(shape: tuple[int, ...]) -> None:
    values = np.arange(3 * np.prod(shape), dtype="float32").reshape(3, *shape)
    scored = score_batch(
        FULL,
        plan([out(kind="array", shape=shape, dtype="float32")], batch_rows=2),
        lambda inputs: [values[: len(inputs[0])]],
    )
    assert scored["y"].to_pylist() == [*values[:2].tolist(), *values[:1].tolist()]
    assert depth(scored["y"].type) == len(shape)


def depth(kind: pa.DataType) -> int:
    return 1 + depth(kind.value_type) if pa.types.is_list(kind) else 0


def test_a_number_that_is_wanted_as_an_array_becomes_a_list_of_one() -> None:
    [column] = output_columns(["y"], [ModelTensor("y", (), "float32")], ["array"])
    declared = scored_schema(T.StructType(), [column])["y"].dataType
    assert declared == T.ArrayType(T.FloatType(), containsNull=False)
    scored = score_batch(FULL, plan([column]), lambda inputs: [inputs[0][:, 0]])
    assert scored["y"].to_pylist() == [[1.0], [2.0], [3.0]]


def test_several_outputs_come_in_their_order() -> None:
    outputs = [out("a"), out("b", "vector", (2,)), out("c", "array", (1,), "int64")]

    def scorer(inputs: Sequence[Block]) -> list[Block]:
        x = inputs[0]
        return [x, np.concatenate([x, -x], axis=1), x.astype("int64")]

    scored = score_batch(FULL, plan(outputs, batch_rows=2), scorer)
    assert scored["a"].to_pylist() == [1.0, 2.0, 3.0]
    assert [row["values"] for row in scored["b"].to_pylist()] == [[1.0, -1.0], [2.0, -2.0], [3.0, -3.0]]
    assert scored["c"].to_pylist() == [[1], [2], [3]]


def test_several_inputs_are_filled_as_planned() -> None:
    seen: list[Block] = []

    def scorer(inputs: Sequence[Block]) -> list[Block]:
        seen.extend(inputs)
        return [np.zeros((len(inputs[0]), 1))]

    batch = pa.RecordBatch.from_pydict({"x": pa.array([1, 2], pa.float32()), "v": [[3.0, 4.0, 5.0], [6.0, 7.0, 8.0]]})
    features = (TensorSpec(("v", "x"), (2, 2), "float32"), TensorSpec(("x",), (1,), "float32"))
    score_batch(batch, plan([out()], (X, V), features), scorer)
    assert [values.dtype.name for values in seen] == ["float32", "float32"]
    assert seen[0].tolist() == [[[3.0, 4.0], [5.0, 1.0]], [[6.0, 7.0], [8.0, 2.0]]]
    assert seen[1].tolist() == [[1.0], [2.0]]


def test_nulls_in_a_feature_are_refused() -> None:
    batch = pa.RecordBatch.from_pydict({"x": pa.array([1.0, None], pa.float32())})
    with pytest.raises(NullValueError, match=r"column 'x' has 1 nulls"):
        score_batch(batch, plan([out()]), twice)


def test_ragged_features_are_refused() -> None:
    batch = pa.RecordBatch.from_pydict({"v": [[1.0, 2.0], [1.0]]})
    with pytest.raises(RaggedArrayError, match=r"column 'v' has rows of different lengths"):
        score_batch(batch, plan([out()], [V], [TensorSpec(("v",), (2,), "float32")]), twice)


def test_arrays_of_another_length_than_the_model_takes_name_their_column() -> None:
    batch = pa.RecordBatch.from_pydict({"v": [[1.0, 2.0], [3.0, 4.0]]})
    with pytest.raises((RaggedArrayError, SchemaError), match=r"'?v'?.*3.*2|'?v'?.*2.*3"):
        score_batch(batch, plan([out()], [V], [TensorSpec(("v",), (3,), "float32")]), twice)


@pytest.mark.parametrize(
    ("shape", "dtype", "wanted", "expected"),
    [
        ((1,), "float32", None, ("scalar", "float64")),
        ((), "float32", None, ("scalar", "float64")),
        ((1,), "bfloat16", None, ("scalar", "float64")),
        ((1,), "int64", None, ("scalar", "int64")),
        ((1,), "bool", None, ("scalar", "bool")),
        ((10,), "float32", None, ("vector", "float64")),
        ((10,), "float16", None, ("vector", "float64")),
        ((10,), "int32", None, ("array", "int32")),
        ((None,), "float32", None, ("vector", "float64")),
        ((2, 2), "float32", None, ("array", "float32")),
        ((2, 2), "float16", None, ("array", "float32")),
        ((2, 2), "float64", None, ("array", "float64")),
        ((1, 1), "float32", None, ("array", "float32")),
        ((1, 1), "float32", "scalar", ("scalar", "float64")),
        ((1,), "float32", "vector", ("vector", "float64")),
        ((10,), "float32", "array", ("array", "float32")),
        ((None,), "float32", "scalar", ("scalar", "float64")),
        ((2, 2), "float32", "vector", ("vector", "float64")),
    ],
)
def test_an_output_becomes_what_fits_it_or_what_is_wanted(
    shape: tuple[int | None, ...], dtype: str, wanted: str | None, expected: tuple[str, str]
) -> None:
    [column] = output_columns(["y"], [ModelTensor("out", shape, dtype)], [wanted])
    assert (column.name, column.shape) == ("y", shape)
    assert (column.kind, column.dtype) == expected


def test_a_vector_holds_doubles_whatever_the_output_is() -> None:
    [column] = output_columns(["y"], [ModelTensor("out", (3,), "int64")], ["vector"])
    assert column.dtype == "float64"


def test_one_name_per_output() -> None:
    with pytest.raises(ParamError, match=r"output_cols has 1 names, but the model has 2 outputs") as caught:
        output_columns(["y"], [ModelTensor("a", (1,), "float32"), ModelTensor("b", (1,), "float32")], [None, None])
    assert caught.value.param == "output_cols"


def test_many_values_are_no_scalar() -> None:
    with pytest.raises(ParamError, match=r"'y' cannot be a scalar: the model gives 3 values per row") as caught:
        output_columns(["y"], [ModelTensor("a", (3,), "float32")], ["scalar"])
    assert caught.value.param == "output_types"


def test_an_unknown_type_of_output_is_refused() -> None:
    with pytest.raises(ParamError, match=r"'tensor' of 'y' is not known; choose 'scalar', 'vector' or 'array'"):
        output_columns(["y"], [ModelTensor("a", (3,), "float32")], ["tensor"])


def test_the_schema_keeps_fields_with_their_metadata_and_appends_the_outputs() -> None:
    before = (
        T.StructType().add("v", VectorUDT(), metadata={"ml_attr": {"num_attrs": 2}}).add("t", T.StringType(), False)
    )
    after = scored_schema(before, [out("a"), out("b", "vector", (3,)), out("c", "array", (2, 2), "float32")])
    assert after.fields[:2] == before.fields
    assert [field.name for field in after.fields[2:]] == ["a", "b", "c"]
    assert [field.dataType for field in after.fields[2:]] == [
        T.DoubleType(),
        VectorUDT(),
        T.ArrayType(T.ArrayType(T.FloatType(), False), False),
    ]
    assert before.names == ["v", "t"]


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("bool", T.BooleanType()),
        ("int8", T.ByteType()),
        ("int16", T.ShortType()),
        ("int32", T.IntegerType()),
        ("int64", T.LongType()),
        ("float32", T.FloatType()),
        ("float64", T.DoubleType()),
    ],
)
def test_every_dtype_has_its_spark_type(dtype: str, expected: T.DataType) -> None:
    assert scored_schema(T.StructType(), [out(dtype=dtype)])["y"].dataType == expected


def test_a_dtype_that_no_column_holds_is_refused() -> None:
    with pytest.raises(ParamError, match=r"'y' has dtype complex64, which no column type holds"):
        scored_schema(T.StructType(), [out(dtype="complex64")])


def test_an_output_column_that_exists_already_is_refused() -> None:
    with pytest.raises(SchemaError, match=r"'y' exists already.*setOutputCols") as caught:
        scored_schema(T.StructType().add("y", T.DoubleType()), [out("x"), out("y")])
    assert caught.value.column == "y"


def test_two_outputs_of_one_name_are_refused() -> None:
    with pytest.raises((SchemaError, ParamError), match=r"'y'"):
        scored_schema(T.StructType(), [out("y"), out("y")])


def test_an_output_column_that_differs_only_by_case_is_refused() -> None:
    with pytest.raises(SchemaError, match=r"'Y' exists already|'y'"):
        scored_schema(T.StructType().add("y", T.DoubleType()), [out("Y")])


class Heavy:
    """A scorer that refers to itself, so that only a collection of garbage can remove it."""

    def __init__(self) -> None:
        self.itself = self

    def __call__(self, inputs: Sequence[Block]) -> list[Block]:
        return twice(inputs)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[weakref.ref[Heavy]]]:
    """Give a Python worker that has no scorer yet; the list fills with those that it loads, unless they are gone."""
    found: list[weakref.ref[Heavy]] = []

    def load(payload: bytes) -> Heavy:
        scorer = Heavy()
        found.append(weakref.ref(scorer))
        return scorer

    monkeypatch.setitem(sys.modules, "heavy_scorers", types.SimpleNamespace(load=load))  # type: ignore[misc]
    monkeypatch.setattr(predict, "_kept", {})
    yield found
    gc.unfreeze()


def run_task(key: str, size_bytes: int = 0) -> None:
    payload: Any = types.SimpleNamespace(value=bytes(size_bytes))
    heavy = replace(plan([out()]), loader="heavy_scorers:load", key=key)
    [scored] = predict._task_of(heavy, payload, FULL.schema.names)([FULL])
    assert scored.column(scored.num_columns - 1).to_pylist() == [2.0, 4.0, 6.0]


def test_a_worker_loads_a_model_once_and_collections_of_garbage_pass_it_over(loaded: list[weakref.ref[Heavy]]) -> None:
    run_task("first")
    run_task("first")
    assert len(loaded) == 1
    assert not any(isinstance(found, Heavy) for found in gc.get_objects())
    assert predict._kept["first"].scorer is loaded[0]()


def test_models_that_take_turns_are_loaded_once_each(loaded: list[weakref.ref[Heavy]]) -> None:
    for key in ("first", "second", "first", "second"):
        run_task(key)
    assert len(loaded) == 2


def test_of_many_models_the_one_that_was_not_used_for_longest_goes(loaded: list[weakref.ref[Heavy]]) -> None:
    for key in ("0", "1", "2", "3", "0", "4"):
        run_task(key)
    assert len(loaded) == predict.MAX_SCORERS + 1 == 5
    assert [number for number, scorer in enumerate(loaded) if scorer() is None] == [1]
    assert not any(isinstance(found, Heavy) for found in gc.get_objects())


def test_large_models_go_sooner(loaded: list[weakref.ref[Heavy]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "MAX_PAYLOAD_BYTES", 100)
    for key, size_bytes in (("first", 40), ("second", 40), ("third", 50), ("giant", 1000)):
        run_task(key, size_bytes)
        left = [number for number, scorer in enumerate(loaded) if scorer() is not None]
        assert left == {"first": [0], "second": [0, 1], "third": [1, 2], "giant": [3]}[key]
