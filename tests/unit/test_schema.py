"""What a DataFrame's schema must be, found out without a job: pure functions of the schema."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from column_kinds import IMAGE
from pyspark.ml.linalg import VectorUDT
from pyspark.mllib.linalg import VectorUDT as OldVectorUDT
from pyspark.sql import types as T

from hvdspark.data.columns import column_spec
from hvdspark.data.missing import Missing
from hvdspark.data.schema import SPARSE_WIDTH, check_columns, resolve, split_condition
from hvdspark.errors import ParamError, SchemaError
from hvdspark.plan import BatchSpec, ColumnSpec, ModelTensor, TensorSpec

SCHEMA = (
    T.StructType()
    .add("flag", T.BooleanType())
    .add("i8", T.ByteType())
    .add("i16", T.ShortType())
    .add("i32", T.IntegerType())
    .add("i64", T.LongType())
    .add("f32", T.FloatType())
    .add("f64", T.DoubleType())
    .add("floats", T.ArrayType(T.FloatType()))
    .add("doubles", T.ArrayType(T.DoubleType()))
    .add("ints", T.ArrayType(T.LongType()))
    .add("vector", VectorUDT())
    .add("known", VectorUDT(), metadata={"ml_attr": {"num_attrs": 4}})
    .add("text", T.StringType())
    .add("day", T.DateType())
    .add("moment", T.TimestampType())
    .add("local", T.TimestampNTZType())
    .add("bytes", T.BinaryType())
    .add("image", IMAGE)
    .add("matrix", T.ArrayType(T.ArrayType(T.FloatType())))
    .add("other.name", T.DoubleType())
)


def tensor(*shape: int | None, dtype: str = "float32", name: str = "x") -> ModelTensor:
    return ModelTensor(name, shape, dtype)


def as_stored(column: ColumnSpec) -> ColumnSpec:
    return dataclasses.replace(column, fed_as=())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("flag", ColumnSpec("flag", "scalar", "bool")),
        ("i8", ColumnSpec("i8", "scalar", "int8")),
        ("i16", ColumnSpec("i16", "scalar", "int16")),
        ("i32", ColumnSpec("i32", "scalar", "int32")),
        ("i64", ColumnSpec("i64", "scalar", "int64")),
        ("f32", ColumnSpec("f32", "scalar", "float32")),
        ("f64", ColumnSpec("f64", "scalar", "float64")),
        ("floats", ColumnSpec("floats", "array", "float32", None)),
        ("doubles", ColumnSpec("doubles", "array", "float64", None)),
        ("ints", ColumnSpec("ints", "array", "int64", None)),
        ("vector", ColumnSpec("vector", "vector", "float64", None)),
        ("known", ColumnSpec("known", "vector", "float64", 4)),
        ("text", ColumnSpec("text", "string", "string", storage="text")),
        ("day", ColumnSpec("day", "date", "int32")),
        ("moment", ColumnSpec("moment", "timestamp", "int64")),
        ("local", ColumnSpec("local", "timestamp", "int64")),
        ("bytes", ColumnSpec("bytes", "binary", "uint8", None)),
        ("image", ColumnSpec("image", "image", "uint8", None)),
        ("matrix", ColumnSpec("matrix", "array", "float32", None)),
        ("other.name", ColumnSpec("other.name", "scalar", "float64")),
    ],
)
def test_every_accepted_type_is_described(name: str, expected: ColumnSpec) -> None:
    assert column_spec(SCHEMA, name) == expected


def test_the_vectors_of_the_old_mllib_are_vectors_too() -> None:
    schema = T.StructType().add("v", OldVectorUDT())
    assert column_spec(schema, "v") == ColumnSpec("v", "vector", "float64", None)


@pytest.mark.parametrize(
    "metadata", [{}, {"ml_attr": {}}, {"ml_attr": {"attrs": {"numeric": []}}}, {"note": "mine"}], ids=str
)
def test_metadata_without_a_size_leaves_the_size_to_the_rows(metadata: dict[str, Any]) -> None:
    schema = T.StructType().add("v", VectorUDT(), metadata=metadata)
    assert column_spec(schema, "v").size is None


@pytest.mark.parametrize(
    ("data_type", "remedy"),
    [
        (T.DecimalType(10, 2), "cast it to double"),
        (T.MapType(T.StringType(), T.DoubleType()), "select the entries"),
        (T.StructType().add("x", T.DoubleType()), "select the fields"),
        (T.ArrayType(T.StringType()), r"array_join\(\)"),
        (T.ArrayType(T.DateType()), r"transform\(\)"),
        (T.ArrayType(T.ArrayType(T.DecimalType(10, 2))), "cast to array<double>"),
        (T.DayTimeIntervalType(), "number"),
        (T.YearMonthIntervalType(), "months"),
        (T.VariantType(), r"variant_get\(\)"),
        (T.NullType(), "cast it"),
    ],
    ids=lambda value: value.simpleString() if isinstance(value, T.DataType) else "",
)
def test_every_other_type_is_refused_with_a_remedy(data_type: T.DataType, remedy: str) -> None:
    with pytest.raises(SchemaError, match=rf"column 'c' has type .*{remedy}") as caught:
        column_spec(T.StructType().add("c", data_type), "c")
    assert (caught.value.column, caught.value.found) == ("c", data_type.simpleString())
    assert "Spark ML vector" in caught.value.expected


@pytest.mark.parametrize(
    "given",
    [
        {"feature_cols": ["i33"]},
        {"feature_cols": ["f32", ["i64", "i33"]]},
        {"feature_cols": ["f32"], "label_cols": ["i33"]},
        {"feature_cols": ["f32"], "sample_weight_col": "i33"},
    ],
    ids=str,
)
def test_a_missing_column_names_the_closest_wherever_it_is_asked_for(given: dict[str, Any]) -> None:
    with pytest.raises(SchemaError, match=r"column 'i33' does not exist. Did you mean 'i") as caught:
        check_columns(SCHEMA, **given)
    assert caught.value.column == "i33"
    assert "f64" in caught.value.found


def test_a_column_with_a_dot_in_its_name_is_no_field_of_a_struct() -> None:
    schema = T.StructType().add("other", T.StructType().add("name", T.DoubleType()))
    with pytest.raises(SchemaError, match=r"column 'other\.name' does not exist"):
        column_spec(schema, "other.name")


def test_the_number_of_entries_must_be_that_of_the_inputs() -> None:
    inputs = [tensor(1, name="left"), tensor(4, name="right")]
    with pytest.raises(ParamError, match=r"3 entries.*2 inputs: left\(1\), right\(4\)") as caught:
        check_columns(SCHEMA, feature_cols=["f32", "i64", "known"], inputs=inputs)
    assert caught.value.param == "feature_cols"


def test_the_number_of_labels_must_be_that_of_the_outputs() -> None:
    with pytest.raises(ParamError, match=r"1 entries.*2 outputs: a, b") as caught:
        check_columns(
            SCHEMA, feature_cols=["f32"], label_cols=["i64"], outputs=[tensor(1, name="a"), tensor(1, name="b")]
        )
    assert caught.value.param == "label_cols"


@pytest.mark.parametrize(
    ("group", "size"), [("f32", 2), ("known", 3), (["f32", "f64"], 3), (["known", "f32"], 4), (["known", "floats"], 3)]
)
def test_columns_of_another_size_than_the_input_are_refused(group: Any, size: int) -> None:
    with pytest.raises(SchemaError, match=rf"'image' takes {size} \(shape \({size}\)\)") as caught:
        check_columns(SCHEMA, feature_cols=[group], inputs=[tensor(size, name="image")])
    assert caught.value.column == (group if isinstance(group, str) else group[0])
    assert caught.value.expected == f"{size} values"


def test_a_size_that_only_the_rows_tell_is_checked_once_it_is_known() -> None:
    _, batch = check_columns(SCHEMA, feature_cols=["floats"], inputs=[tensor(2, 3)])
    assert batch.features == (TensorSpec(("floats",), (2, 3), "float32"),)
    sized = [ColumnSpec("floats", "array", "float32", 6)]
    assert resolve(batch, sized).features == batch.features
    with pytest.raises(SchemaError, match=r"floats hold 5 values per row, but the model takes 6"):
        resolve(batch, [ColumnSpec("floats", "array", "float32", 5)])


def test_several_columns_fill_one_input_in_their_order() -> None:
    columns, batch = check_columns(
        SCHEMA, feature_cols=[["known", "i32", "floats"], "f32"], inputs=[tensor(8), tensor(1)]
    )
    assert [spec.name for spec in columns] == ["known", "i32", "floats", "f32"]
    assert batch.features[0] == TensorSpec(("known", "i32", "floats"), (8,), "float32")
    sized = [*columns[:2], ColumnSpec("floats", "array", "float32", 3), *columns[3:]]
    assert resolve(batch, sized).features[0].shape == (8,)


@pytest.mark.parametrize("dtype", ["int32", "int64", "uint8"])
@pytest.mark.parametrize("name", ["f32", "f64", "floats", "vector"])
def test_an_integer_input_refuses_a_column_of_fractions(name: str, dtype: str) -> None:
    with pytest.raises(SchemaError, match=rf"'{name}' holds float.* takes {dtype}.*Cast the column") as caught:
        check_columns(SCHEMA, feature_cols=[name], inputs=[tensor(None, dtype=dtype)])
    assert (caught.value.column, caught.value.expected) == (name, dtype)


@pytest.mark.parametrize("name", ["flag", "i8", "i16", "i32", "i64"])
def test_integers_fill_an_integer_input_and_are_stored_as_they_are(name: str) -> None:
    columns, batch = check_columns(SCHEMA, feature_cols=[name], inputs=[tensor(1, dtype="int32")])
    assert [as_stored(column) for column in columns] == [column_spec(SCHEMA, name)]
    assert batch.features[0].dtype == "int32"


@pytest.mark.parametrize("name", ["f64", "doubles", "vector"])
@pytest.mark.parametrize(
    ("dtypes", "stored"),
    [
        (["float32"], "float32"),
        (["float16"], "float32"),
        (["bfloat16"], "float32"),
        (["float64"], "float64"),
        (["float32", "float64"], "float64"),
        (["float32", "float32"], "float32"),
    ],
    ids=str,
)
def test_doubles_are_stored_narrow_only_where_no_input_wants_more(name: str, dtypes: list[str], stored: str) -> None:
    size = 1 if name == "f64" else None
    inputs = [tensor(size, dtype=dtype) for dtype in dtypes]
    columns, _ = check_columns(SCHEMA, feature_cols=[name] * len(dtypes), inputs=inputs)
    assert [spec.dtype for spec in columns] == [stored]


def test_a_double_that_is_feature_and_label_of_a_wide_model_stays_wide() -> None:
    columns, batch = check_columns(
        SCHEMA,
        feature_cols=["f64"],
        label_cols=["f64"],
        inputs=[tensor(1)],
        outputs=[tensor(1, dtype="float64")],
    )
    assert columns == (ColumnSpec("f64", "scalar", "float64", fed_as=("float32",)),)
    assert batch.labels[0].dtype is None


def test_a_model_that_states_no_inputs_gets_floats_and_whole_numbers_as_they_are() -> None:
    columns, batch = check_columns(SCHEMA, feature_cols=["f64", "i64", ["i32", "f64"], "flag", "known"])
    assert [spec.dtype for spec in batch.features] == ["float32", None, "float32", "float32", "float32"]
    assert all(spec.shape is None for spec in batch.features)
    assert {spec.name: spec.dtype for spec in columns} == {
        "f64": "float32",
        "i64": "int64",
        "i32": "int32",
        "flag": "bool",
        "known": "float32",
    }
    assert [spec.shape for spec in resolve(batch, columns).features] == [(1,), (1,), (2,), (1,), (4,)]


@pytest.mark.parametrize("name", ["flag", "i8", "i64"])
def test_whole_labels_stay_whole_for_sparse_losses(name: str) -> None:
    columns, batch = check_columns(
        SCHEMA, feature_cols=["f32"], label_cols=[name], inputs=[tensor(1)], outputs=[tensor(10)]
    )
    assert columns[1] == column_spec(SCHEMA, name)
    assert [(label.columns, label.shape, label.dtype) for label in batch.labels] == [((name,), (1,), None)]
    assert resolve(batch, columns).labels[0].shape == (1,)


def test_double_labels_become_what_the_output_is() -> None:
    for dtype, stored in (("float32", "float32"), ("bfloat16", "float32"), ("float64", "float64")):
        columns, _ = check_columns(SCHEMA, feature_cols=["f32"], label_cols=["f64"], outputs=[tensor(1, dtype=dtype)])
        assert columns[1].dtype == stored


@pytest.mark.parametrize(
    ("label", "output", "shape"),
    [
        ("f32", (1,), (1,)),
        ("f32", (), ()),
        ("i64", (10,), (1,)),
        ("known", (4,), (4,)),
        ("known", (2, 2), (2, 2)),
        ("known", (5,), (4,)),
    ],
    ids=str,
)
def test_a_label_has_the_shape_of_its_output_where_that_fits(
    label: str, output: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    columns, batch = check_columns(SCHEMA, feature_cols=["f32"], label_cols=[label], outputs=[tensor(*output)])
    assert resolve(batch, columns).labels[0].shape == shape


@pytest.mark.parametrize("label", ["floats", "vector"])
def test_a_label_sized_by_its_rows_has_the_shape_of_its_output_as_well(label: str) -> None:
    columns, batch = check_columns(SCHEMA, feature_cols=["f32"], label_cols=[label], outputs=[tensor(2, 3)])
    sized = [columns[0], ColumnSpec(label, columns[1].kind, "float32", 6)]
    assert resolve(batch, sized).labels[0].shape == (2, 3)


def test_label_shapes_come_first() -> None:
    columns, batch = check_columns(
        SCHEMA, feature_cols=["f32"], label_cols=["known", "f32"], label_shapes=[[2, 2], []], outputs=None
    )
    assert [label.shape for label in resolve(batch, columns).labels] == [(2, 2), ()]


def test_a_label_shape_that_does_not_hold_the_column_is_refused() -> None:
    columns, batch = check_columns(SCHEMA, feature_cols=["f32"], label_cols=["known"], label_shapes=[[3]])
    with pytest.raises(SchemaError, match=r"known hold 4 values per row, but the model takes 3"):
        resolve(batch, columns)


def test_one_label_shape_per_label() -> None:
    with pytest.raises(ParamError, match=r"2 entries for 1 label_cols") as caught:
        check_columns(SCHEMA, feature_cols=["f32"], label_cols=["i64"], label_shapes=[[1], [1]])
    assert caught.value.param == "label_shapes"


@pytest.mark.parametrize("name", ["i8", "i64", "f32", "f64"])
def test_weights_are_stored_as_float32(name: str) -> None:
    columns, batch = check_columns(SCHEMA, feature_cols=["i16"], sample_weight_col=name)
    assert columns == (ColumnSpec("i16", "scalar", "int16"), ColumnSpec(name, "scalar", "float32"))
    assert batch.sample_weight == name
    assert batch.columns == ("i16", name)


@pytest.mark.parametrize("name", ["flag", "floats", "vector"])
def test_a_weight_is_one_number_per_row(name: str) -> None:
    with pytest.raises(SchemaError, match=rf"sample_weight_col '{name}' has type .*one number per row") as caught:
        check_columns(SCHEMA, feature_cols=["f32"], sample_weight_col=name)
    assert caught.value.column == name


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("i64", {"feature_cols": ["i64"], "inputs": [ModelTensor("x", (1,), "int64")]}),
        ("f64", {"feature_cols": ["f64"], "inputs": [ModelTensor("x", (1,), "float64")]}),
        ("i32", {"feature_cols": ["f32"], "label_cols": ["i32"]}),
    ],
    ids=["whole feature", "wide feature", "whole label"],
)
def test_a_weight_that_is_also_fed_to_the_model_keeps_its_values(name: str, given: dict[str, Any]) -> None:
    columns, _ = check_columns(SCHEMA, sample_weight_col=name, **given)
    column = next(spec for spec in columns if spec.name == name)
    assert as_stored(column) == column_spec(SCHEMA, name)
    assert column.fed_as == ("float32",)


@pytest.mark.parametrize("fraction", [0.001, 0.5, 0.999])
def test_a_validation_fraction_names_no_column(fraction: float) -> None:
    assert split_condition(SCHEMA, fraction) is None
    assert split_condition(SCHEMA, None) is None


@pytest.mark.parametrize("fraction", [0.0, 1.0, 1, 0, -0.1, 1.5, float("nan"), float("inf")])
def test_a_validation_fraction_lies_between_0_and_1(fraction: float) -> None:
    with pytest.raises(ParamError, match=r"validation=.*between 0 and 1") as caught:
        split_condition(SCHEMA, fraction)
    assert caught.value.param == "validation"


@pytest.mark.parametrize("name", ["flag", "i8", "i64", "f64"])
def test_a_validation_column_is_a_number_or_a_boolean(name: str) -> None:
    assert split_condition(SCHEMA, name) == name


@pytest.mark.parametrize(("name", "message"), [("floats", "0/1"), ("known", "0/1"), ("text", "0/1")])
def test_a_validation_column_of_another_type_is_refused(name: str, message: str) -> None:
    with pytest.raises(SchemaError, match=message) as caught:
        split_condition(SCHEMA, name)
    assert caught.value.column == name


def test_a_missing_validation_column_names_the_closest() -> None:
    with pytest.raises(SchemaError, match=r"'flags' does not exist. Did you mean 'flag'"):
        split_condition(SCHEMA, "flags")


def test_the_same_name_twice_is_refused() -> None:
    schema = T.StructType([T.StructField("a", T.LongType()), T.StructField("a", T.DoubleType())])
    with pytest.raises(SchemaError, match=r"'a'"):
        column_spec(schema, "a")


def test_an_open_axis_of_an_input_is_told_by_the_columns() -> None:
    open_input = ModelTensor("x", (None, 2), "float32")
    columns, batch = check_columns(SCHEMA, feature_cols=["known"], inputs=[open_input])
    assert resolve(batch, columns).features[0].shape == (2, 2)
    columns, batch = check_columns(SCHEMA, feature_cols=["f32"], inputs=[open_input])
    with pytest.raises(SchemaError, match=r"f32 hold 1 values per row, which do not fill the model's shape \(\?, 2\)"):
        resolve(batch, columns)
    with pytest.raises(ParamError, match=r"only one axis can be told"):
        check_columns(SCHEMA, feature_cols=["known"], inputs=[ModelTensor("x", (None, None), "float32")])


@pytest.mark.parametrize(
    ("name", "dtype", "remedy"),
    [
        ("moment", "float32", "int64 or float64.*unix_timestamp"),
        ("moment", "float16", "int64 or float64"),
        ("moment", "int32", "int64 or float64"),
        ("local", "bfloat16", "int64 or float64"),
        ("day", "float16", "int32 or float32.*dayofweek"),
        ("day", "int16", "int32 or float32"),
    ],
)
def test_times_that_the_model_would_round_are_refused(name: str, dtype: str, remedy: str) -> None:
    with pytest.raises(SchemaError, match=rf"column '{name}' .* takes {dtype}, which cannot hold.*{remedy}") as caught:
        check_columns(SCHEMA, feature_cols=[name], inputs=[tensor(1, dtype=dtype)])
    assert (caught.value.column, caught.value.found) == (name, dtype)
    with pytest.raises(SchemaError, match=rf"column '{name}' .* output is {dtype}, which cannot hold"):
        check_columns(SCHEMA, feature_cols=["f32"], label_cols=[name], outputs=[tensor(1, dtype=dtype)])


@pytest.mark.parametrize(
    ("name", "dtype"), [("moment", "int64"), ("moment", "float64"), ("day", "int32"), ("day", "float32")]
)
def test_times_that_the_model_holds_are_stored_as_whole_numbers(name: str, dtype: str) -> None:
    columns, batch = check_columns(SCHEMA, feature_cols=[name], inputs=[tensor(1, dtype=dtype)])
    assert [as_stored(column) for column in columns] == [column_spec(SCHEMA, name)]
    assert batch.features[0].dtype == dtype


@pytest.mark.parametrize(
    ("name", "dtypes", "fed_as"),
    [
        ("i64", ["float32", "int32", "float64", "float32"], ("float32", "float64", "int32")),
        ("i64", ["int64"], ()),
        ("i32", ["float32", "float64"], ("float32",)),
        ("i32", ["bool"], ("bool",)),
        ("flag", ["float32", "bool", "int32"], ()),
        ("f32", ["float32", "float64", "bfloat16"], ()),
        ("f64", ["float32"], ()),
        ("moment", ["float64"], ("float64",)),
        ("day", ["float32", "float64"], ("float32",)),
    ],
)
def test_a_column_states_the_types_that_do_not_hold_all_of_it(
    name: str, dtypes: list[str], fed_as: tuple[str, ...]
) -> None:
    inputs = [tensor(1, dtype=dtype) for dtype in dtypes]
    columns, _ = check_columns(SCHEMA, feature_cols=[name] * len(dtypes), inputs=inputs)
    assert columns[0].fed_as == fed_as


@pytest.mark.parametrize("name", ["f32", "f64", "doubles", "vector"])
def test_fractions_are_no_truth_values(name: str) -> None:
    with pytest.raises(SchemaError, match=rf"column '{name}' holds float.* takes bool.*True.*> 0\.5") as caught:
        check_columns(SCHEMA, feature_cols=[name], inputs=[tensor(None, dtype="bool")])
    assert (caught.value.column, caught.value.expected) == (name, "bool")


def test_a_model_that_states_no_inputs_takes_a_timestamp_alone_but_not_beside_fractions() -> None:
    columns, batch = check_columns(SCHEMA, feature_cols=["moment"])
    assert (columns[0].dtype, batch.features[0].dtype) == ("int64", None)
    with pytest.raises(SchemaError, match=r"'moment' is a timestamp.*fed as float32"):
        check_columns(SCHEMA, feature_cols=[["moment", "f64"]])


def test_strings_go_to_inputs_of_strings_and_nowhere_else() -> None:
    columns, batch = check_columns(SCHEMA, feature_cols=["text"], inputs=[tensor(1, dtype="string")])
    assert (columns[0].storage, batch.features[0]) == ("text", TensorSpec(("text",), (1,), "string"))
    with pytest.raises(SchemaError, match=r"'text' has type string, but .*'x' takes float32.*StringIndexer"):
        check_columns(SCHEMA, feature_cols=["text"], inputs=[tensor(1)])
    with pytest.raises(SchemaError, match=r"does not state that it takes strings"):
        check_columns(SCHEMA, feature_cols=["text"])
    with pytest.raises(SchemaError, match=r"'i64' holds int64, but .*'x' takes string; cast the column"):
        check_columns(SCHEMA, feature_cols=["i64"], inputs=[tensor(1, dtype="string")])


def test_a_string_is_no_label_unless_the_model_gives_strings() -> None:
    with pytest.raises(SchemaError, match=r"column 'text'.*StringIndexer"):
        check_columns(SCHEMA, feature_cols=["f32"], label_cols=["text"], outputs=[tensor(1)])
    with pytest.raises(SchemaError, match=r"column 'text'.*StringIndexer"):
        check_columns(SCHEMA, feature_cols=["f32"], label_cols=["text"])
    _, batch = check_columns(SCHEMA, feature_cols=["f32"], label_cols=["text"], outputs=[tensor(1, dtype="string")])
    assert batch.labels[0].dtype == "string"


@pytest.mark.parametrize(
    ("width", "sparse", "storage"),
    [
        (SPARSE_WIDTH, False, "dense"),
        (SPARSE_WIDTH + 1, False, "sparse"),
        (None, False, "dense"),
        (None, True, "sparse"),
        (4, True, "sparse"),
    ],
)
def test_wide_vectors_are_stored_sparse(width: int | None, sparse: bool, storage: str) -> None:
    stated = {} if width is None else {"ml_attr": {"num_attrs": width}}
    by_metadata = T.StructType().add("v", VectorUDT(), metadata=stated)
    columns, _ = check_columns(by_metadata, feature_cols=["v"], sparse=sparse)
    assert columns[0].storage == storage
    if width is not None:
        columns, _ = check_columns(SCHEMA, feature_cols=["vector"], inputs=[tensor(width)], sparse=sparse)
        assert columns[0].storage == storage


@pytest.mark.parametrize(
    ("fills", "filled"),
    [
        ({"i8": -128}, -128),
        ({"i64": 2**63 - 1}, 2**63 - 1),
        ({"i32": 3.0}, 3),
        ({"f32": 1}, 1.0),
        ({"flag": True}, True),
        ({"flag": 0}, False),
        ({"floats": 0.5}, 0.5),
        ({"vector": 0}, 0.0),
        ({"text": ""}, ""),
        ({"day": "1970-01-03"}, 2),
        ({"day": -1}, -1),
        ({"moment": "1970-01-01T01:00:00+01:00"}, 0),
        ({"local": "1970-01-01T00:00:01"}, 1_000_000),
    ],
    ids=str,
)
def test_a_fill_is_kept_as_the_column_has_it(fills: dict[str, Any], filled: Any) -> None:
    [name] = fills
    found = Missing.from_params(fills, None).apply({name: column_spec(SCHEMA, name)})[name].fill
    assert (found, type(found)) == (filled, type(filled))


@pytest.mark.parametrize(
    "fills",
    [
        {"i8": 128},
        {"i32": 0.5},
        {"i32": float("nan")},
        {"i32": True},
        {"i32": "0"},
        {"f32": 1e39},
        {"f64": "nan"},
        {"flag": 2},
        {"text": 0},
        {"day": "yesterday"},
        {"day": 1.5},
        {"moment": "2020-13-01"},
        {"bytes": 0},
        {"image": 0},
        {"absent": 0},
    ],
    ids=str,
)
def test_a_fill_that_the_column_cannot_hold_is_refused(fills: dict[str, Any]) -> None:
    [name] = fills
    specs = {} if name == "absent" else {name: column_spec(SCHEMA, name)}
    with pytest.raises(ParamError, match=rf"fill_nulls.*'{name}'") as caught:
        Missing.from_params(fills, None).apply(specs)
    assert caught.value.param == "fill_nulls"


def test_sparse_vectors_are_filled_with_zeros_only() -> None:
    with pytest.raises(ParamError, match=r"stored sparse; give 0"):
        check_columns(SCHEMA, feature_cols=["known"], missing=Missing({"known": 1.0}), sparse=True)


def padded(value: Any = 0, length: int | None = None) -> Missing:
    return Missing.from_params(None, {"ints": {"value": value, "length": length}})


def test_padding_goes_to_the_length_that_the_model_leaves() -> None:
    columns, _ = check_columns(SCHEMA, feature_cols=["ints"], inputs=[tensor(6, dtype="int64")], missing=padded())
    assert columns == (ColumnSpec("ints", "array", "int64", 6, padding=0),)
    columns, _ = check_columns(SCHEMA, feature_cols=[["known", "ints"]], inputs=[tensor(6)], missing=padded())
    assert columns[1].size == 2
    columns, batch = check_columns(
        SCHEMA, feature_cols=["ints"], inputs=[tensor(None, dtype="int64")], missing=padded(length=9)
    )
    assert resolve(batch, columns).features[0].shape == (9,)


@pytest.mark.parametrize(
    ("missing", "size", "message"),
    [
        (padded(), None, r"padding of 'ints' has no length"),
        (padded(length=5), 6, r"hold 5 values per row, but the model's input 'x' takes 6"),
        (padded(0.5), 6, r"padding=.*0\.5.*whole number"),
        (Missing.from_params(None, {"i64": {"value": 0}}), 6, r"padding names the column 'i64', which is neither"),
    ],
    ids=["no length", "wrong length", "wrong value", "no array"],
)
def test_padding_that_does_not_fit_is_refused_before_a_job(missing: Missing, size: int | None, message: str) -> None:
    with pytest.raises((ParamError, SchemaError), match=message):
        check_columns(SCHEMA, feature_cols=["ints"], inputs=[tensor(size, dtype="int64")], missing=missing)


def test_only_arrays_are_padded() -> None:
    with pytest.raises(ParamError, match=r"'known', which is no array"):
        check_columns(SCHEMA, feature_cols=["known"], missing=Missing.from_params(None, {"known": {"value": 0}}))


@pytest.mark.parametrize(
    ("wanted", "found", "shape"),
    [
        ((8, 8, 1), (64,), (8, 8, 1)),
        ((64,), (8, 8, 1), (64,)),
        ((8, 8, 1), (8, 8), (8, 8, 1)),
        ((8, 8), (8, 8, 1), (8, 8)),
        ((4, 6), (6, 4), None),
        ((2, 3, 4), (4, 6), None),
        ((None, None, 3), (5, 7, 3), (5, 7, 3)),
        ((None, None, 3), (5, 7, 1), None),
        ((None, None, 1), (5, 7), (5, 7, 1)),
        ((None, 3), (12,), (4, 3)),
        ((), (1,), ()),
    ],
)
def test_rows_keep_their_axes_on_the_way_into_the_model(
    wanted: tuple[int | None, ...], found: tuple[int, ...], shape: tuple[int, ...] | None
) -> None:
    if None in wanted:
        given = TensorSpec(("c",), None, None, tuple(-1 if axis is None else axis for axis in wanted))
    else:
        given = TensorSpec(("c",), tuple(axis or 0 for axis in wanted))
    assert given.shape_for(found) == shape
    column = ColumnSpec("c", "array", "float32").with_shape(found)
    if shape is None:
        with pytest.raises(SchemaError, match=r"the columns c hold .* values per row \(shape"):
            resolve(BatchSpec((given,), ()), [column])
    else:
        assert resolve(BatchSpec((given,), ()), [column]).features[0].shape == shape


def test_images_tell_several_open_axes() -> None:
    for name in ("bytes", "image", "matrix"):
        _, batch = check_columns(SCHEMA, feature_cols=[name], inputs=[tensor(None, None, 3)])
        assert batch.features[0].preferred_shape == (-1, -1, 3)
