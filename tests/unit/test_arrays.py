"""Arrow columns to NumPy blocks and back, value by value and bit by bit."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hvdspark.data import petastorm_compat  # noqa: F401  (must come before petastorm)
from hvdspark.data.arrays import fill_tensor, from_array, to_block
from hvdspark.data.blocks import cast, require_fit
from hvdspark.data.npy import pack, unpack
from hvdspark.data.vectors import VECTOR_TYPE
from hvdspark.errors import NullValueError, RaggedArrayError, ValueRangeError
from hvdspark.plan import ColumnSpec, TensorSpec

# isort: split
from petastorm.codecs import NdarrayCodec
from petastorm.unischema import UnischemaField

DTYPES = ("bool", "int8", "int16", "int32", "int64", "float32", "float64")
dtypes = st.sampled_from(DTYPES)
Block = npt.NDArray[Any]


@st.composite
def blocks(draw: st.DrawFn, min_rows: int = 0, max_size: int = 5, only: Sequence[str] = DTYPES) -> Block:
    shape = (draw(st.integers(min_rows, 9)), draw(st.integers(1, max_size)))
    return draw(hnp.arrays(draw(st.sampled_from(list(only))), shape))


@st.composite
def cut(draw: st.DrawFn, rows: int) -> slice:
    start = draw(st.integers(0, rows))
    return slice(start, draw(st.integers(start, rows)))


def same_bits(found: Block, expected: Block) -> bool:
    return found.dtype == expected.dtype and found.shape == expected.shape and found.tobytes() == expected.tobytes()


def lists_of(block: Block) -> pa.ListArray:
    rows, size = block.shape
    return pa.ListArray.from_arrays(pa.array(np.arange(rows + 1, dtype="int32") * size), pa.array(block.reshape(-1)))


def window(column: pa.Array, piece: slice) -> pa.Array:
    return column.slice(piece.start, piece.stop - piece.start)


@given(st.data(), dtypes)
def test_scalars_become_a_block_of_one_column(data: st.DataObject, dtype: str) -> None:
    values = data.draw(hnp.arrays(dtype, st.integers(0, 20)))
    piece = data.draw(cut(len(values)))
    found = to_block(window(pa.array(values), piece), ColumnSpec("a", "scalar", dtype))
    assert same_bits(found, values[piece].reshape(-1, 1))


@given(st.data(), blocks())
def test_arrays_become_a_block_of_their_length(data: st.DataObject, block: Block) -> None:
    piece = data.draw(cut(len(block)))
    stated = data.draw(st.sampled_from([None, block.shape[1]]))
    found = to_block(window(lists_of(block), piece), ColumnSpec("a", "array", block.dtype.name, stated))
    if found.size or stated is not None:
        assert same_bits(found, block[piece])
    else:
        assert found.shape == (0, 0)


@st.composite
def vector_rows(draw: st.DrawFn, size: int) -> dict[str, Any]:
    numbers = st.floats(width=64)
    if draw(st.booleans()):
        values = draw(st.lists(numbers, min_size=size, max_size=size))
        return {"type": 1, "size": None, "indices": None, "values": values}
    indices = sorted(draw(st.sets(st.integers(0, size - 1))))
    values = draw(st.lists(numbers, min_size=len(indices), max_size=len(indices)))
    return {"type": 0, "size": size, "indices": indices, "values": values}


def dense(rows: Sequence[dict[str, Any]], size: int) -> Block:
    block = np.zeros((len(rows), size))
    for row, vector in zip(block, rows, strict=True):
        for place, value in zip(vector["indices"] or range(size), vector["values"], strict=False):
            row[place] = value
    return block


@given(st.data(), st.integers(1, 6))
def test_dense_and_sparse_vectors_become_dense_rows(data: st.DataObject, size: int) -> None:
    rows = data.draw(st.lists(vector_rows(size), max_size=8))
    piece = data.draw(cut(len(rows)))
    stated = data.draw(st.sampled_from([None, size]))
    column = window(pa.array(rows, type=VECTOR_TYPE), piece)
    found = to_block(column, ColumnSpec("v", "vector", "float64", stated))
    if len(column) or stated is not None:
        assert same_bits(found, dense(rows, size)[piece])
    else:
        assert found.shape == (0, 0)


def test_sparse_vectors_without_any_value_are_rows_of_zeros() -> None:
    rows = [{"type": 0, "size": 4, "indices": [], "values": []}] * 3
    found = to_block(pa.array(rows, type=VECTOR_TYPE), ColumnSpec("v", "vector", "float32", 4))
    assert same_bits(found, np.zeros((3, 4), "float32"))


@pytest.mark.parametrize("kind", ["scalar", "array", "vector"])
def test_doubles_are_rounded_to_the_float_that_is_nearest(kind: str) -> None:
    numbers = np.array([0.1, 1 / 3, -2.5, 16777217.0, 1e-40, np.inf, np.nan, -0.0])
    column = {
        "scalar": pa.array(numbers),
        "array": lists_of(numbers.reshape(-1, 1)),
        "vector": from_array(numbers.reshape(-1, 1), "vector"),
    }[kind]
    found = to_block(column, ColumnSpec("a", kind, "float32", 1))  # type: ignore[arg-type]
    assert same_bits(found, numbers.astype("float32").reshape(-1, 1))


def test_blocks_are_contiguous_whatever_the_arrow_layout() -> None:
    block = to_block(lists_of(np.arange(12.0).reshape(4, 3)).slice(1, 2), ColumnSpec("a", "array", "float32", 3))
    assert block.flags["C_CONTIGUOUS"]


@given(st.data(), st.lists(st.one_of(st.none(), st.integers(0, 9)), max_size=12))
def test_null_scalars_are_counted_within_the_slice(data: st.DataObject, values: list[int | None]) -> None:
    piece = data.draw(cut(len(values)))
    column = window(pa.array(values, type=pa.int32()), piece)
    expected = values[piece].count(None)
    if expected:
        with pytest.raises(NullValueError, match=rf"column 'a' has {expected} nulls") as caught:
            to_block(column, ColumnSpec("a", "scalar", "int32"))
        assert (caught.value.column, caught.value.count) == ("a", expected)
    else:
        assert to_block(column, ColumnSpec("a", "scalar", "int32")).ravel().tolist() == values[piece]


null_or_lists = st.one_of(st.none(), st.lists(st.one_of(st.none(), st.integers(0, 9)), min_size=2, max_size=2))


@given(st.data(), st.lists(null_or_lists, max_size=8))
def test_null_arrays_and_null_elements_are_counted_together(
    data: st.DataObject, rows: list[list[int | None] | None]
) -> None:
    piece = data.draw(cut(len(rows)))
    expected = sum(1 if row is None else row.count(None) for row in rows[piece])
    column = window(pa.array(rows, type=pa.list_(pa.int64())), piece)
    if expected:
        with pytest.raises(NullValueError) as caught:
            to_block(column, ColumnSpec("a", "array", "int64", 2))
        assert caught.value.count == expected
    else:
        assert to_block(column, ColumnSpec("a", "array", "int64", 2)).tolist() == rows[piece]


def test_null_vectors_are_counted() -> None:
    one: dict[str, Any] = {"type": 1, "size": None, "indices": None, "values": [1.0]}
    column = pa.array([one, None, one, None, None], type=VECTOR_TYPE)
    with pytest.raises(NullValueError, match=r"column 'v' has 3 nulls"):
        to_block(column, ColumnSpec("v", "vector", "float64"))
    with pytest.raises(NullValueError, match=r"column 'v' has 1 nulls"):
        to_block(column.slice(0, 3), ColumnSpec("v", "vector", "float64"))


@pytest.mark.parametrize(
    ("stated", "lengths"), [(None, (2, 3)), (2, (2, 3)), (3, (3, 2))], ids=["first row", "stated 2", "stated 3"]
)
def test_ragged_arrays_name_the_length_expected_and_the_one_found(stated: int | None, lengths: tuple[int, int]) -> None:
    column = pa.array([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0, 3.0]])
    with pytest.raises(RaggedArrayError, match=r"column 'a'.*Pad") as caught:
        to_block(column, ColumnSpec("a", "array", "float64", stated))
    assert caught.value.lengths == lengths


@pytest.mark.parametrize("second", [{"type": 1, "values": [1.0, 2.0]}, {"type": 0, "size": 2, "indices": [0]}])
def test_vectors_of_different_sizes_are_refused(second: dict[str, Any]) -> None:
    rows = [
        {"type": 0, "size": 3, "indices": [1], "values": [1.0]},
        {"size": None, "indices": None, "values": [5.0], **second},
    ]
    with pytest.raises(RaggedArrayError) as caught:
        to_block(pa.array(rows, type=VECTOR_TYPE), ColumnSpec("v", "vector", "float64", None))
    assert caught.value.lengths == (3, 2)


@given(st.data(), blocks(min_rows=1, max_size=70))
def test_packed_rows_come_back_bit_for_bit(data: st.DataObject, block: Block) -> None:
    piece = data.draw(cut(len(block)))
    column = window(pack(block), piece)
    assert same_bits(unpack(column, block.shape[1:], block.dtype.name), block[piece])


@settings(max_examples=30)
@given(blocks(min_rows=1, max_size=70))
def test_a_packed_cell_is_a_npy_file_that_petastorm_decodes(block: Block) -> None:
    field = UnischemaField("a", block.dtype.type, (block.shape[1],), NdarrayCodec(), False)
    for cell, row in zip(pack(block).to_pylist(), block, strict=True):
        assert same_bits(np.load(io.BytesIO(cell), allow_pickle=False), row)
        assert same_bits(NdarrayCodec().decode(field, cell), row)


def test_packing_keeps_views_that_are_not_contiguous() -> None:
    block = np.arange(24, dtype="int32").reshape(4, 6)[::2, ::3]
    assert same_bits(unpack(pack(block), (2,), "int32"), np.ascontiguousarray(block))


def test_no_rows_are_packed_to_no_cells() -> None:
    assert len(pack(np.zeros((0, 3), "float32"))) == 0


def test_no_outputs_become_no_vectors() -> None:
    assert len(from_array(np.zeros((0, 3), "float32"), "vector")) == 0


def test_columns_are_concatenated_in_order_and_given_dtype_and_shape() -> None:
    parts = {"a": np.array([[1], [2]], "int64"), "b": np.array([[3.5, 4.5, 5.5], [6.5, 7.5, 8.5]], "float64")}
    found = fill_tensor(parts, TensorSpec(("b", "a"), shape=(2, 2), dtype="float32"))
    expected = np.array([[[3.5, 4.5], [5.5, 1.0]], [[6.5, 7.5], [8.5, 2.0]]], "float32")
    assert same_bits(found, expected)


def test_a_tensor_without_dtype_and_shape_is_its_column() -> None:
    block = np.array([[1, 2]], "int8")
    assert same_bits(fill_tensor({"a": block}, TensorSpec(("a",))), block)


@given(st.data(), dtypes, st.integers(0, 3))
def test_outputs_become_lists_nested_by_their_axes(data: st.DataObject, dtype: str, inner: int) -> None:
    shape = data.draw(st.tuples(*[st.integers(0, 3) if axis == 0 else st.integers(1, 3) for axis in range(inner + 2)]))
    values = data.draw(hnp.arrays(dtype, shape))
    column = from_array(values, "array")
    found = np.array(column.to_pylist(), dtype=dtype).reshape(shape)
    assert same_bits(np.where(np.isnan(found), 0, found), np.where(np.isnan(values), 0, values))
    depth, arrow = 0, column.type
    while pa.types.is_list(arrow):
        depth, arrow = depth + 1, arrow.value_type
    assert (depth, arrow) == (inner + 1, pa.array(values.reshape(-1)).type)


@given(blocks(max_size=1))
def test_scalar_outputs_keep_their_values_and_dtype(values: Block) -> None:
    column = from_array(values, "scalar")
    assert column.type == pa.array(values.reshape(-1)).type
    assert same_bits(to_block(column, ColumnSpec("a", "scalar", values.dtype.name)), values)


@given(blocks(min_rows=1, only=("float32", "float64")))
def test_vector_outputs_are_dense_spark_vectors(values: Block) -> None:
    column = from_array(values, "vector")
    assert column.type == VECTOR_TYPE
    found = to_block(column, ColumnSpec("v", "vector", "float64", values.shape[1]))
    assert same_bits(found, values.astype("float64"))


@pytest.mark.parametrize(
    ("given", "dtype", "wrong"),
    [
        ([-(2**31), 2**31], "int32", "2147483648"),
        ([0, -1], "uint64", "-1"),
        ([0, 1, 2], "bool", "2"),
        ([5, 2**63 - 1], "float32", str(2**63 - 1)),
        ([5, 2**63 - 1], "float64", str(2**63 - 1)),
    ],
)
def test_whole_numbers_that_do_not_fit_the_models_type_are_refused_by_value(
    given: list[int], dtype: str, wrong: str
) -> None:
    tensor = TensorSpec(("a",), (1,), dtype)
    values = np.array(given, dtype="int64").reshape(-1, 1)
    assert fill_tensor({"a": values[:1]}, tensor).tolist() == values[:1].tolist()
    with pytest.raises(ValueRangeError, match=rf"'a' has the value {wrong}, which {dtype} cannot hold") as caught:
        fill_tensor({"a": values}, tensor)
    assert (caught.value.column, caught.value.dtype) == ("a", dtype)


whole_numbers = st.integers(-(2**63), 2**63 - 1) | st.integers(-70, 70).map(lambda offset: 2**53 + offset)
whole_numbers |= st.builds(lambda bits, odd: 2**bits + odd, st.integers(20, 62), st.integers(-3, 3))


@given(
    st.lists(whole_numbers, min_size=1, max_size=5), st.sampled_from(["float32", "float64", "int32", "int64", "bool"])
)
def test_whole_numbers_arrive_exactly_or_not_at_all(values: list[int], dtype: str) -> None:
    block = np.array(values, dtype="int64").reshape(-1, 1)
    # Python compares whole numbers and floats exactly.
    fits = {
        "bool": lambda value: value in (0, 1),
        "int32": lambda value: -(2**31) <= value < 2**31,
        "int64": lambda _: True,
        "float32": lambda value: float(np.float32(value)) == value,
        "float64": lambda value: float(value) == value,
    }[dtype]
    if all(map(fits, values)):
        require_fit(block, dtype, "a")
        assert [int(value) for value in cast(block, dtype, "a").ravel()] == values
        return
    for refuses in (cast, require_fit):
        with pytest.raises(ValueRangeError):
            refuses(block, dtype, "a")


def test_an_open_axis_takes_what_the_others_leave() -> None:
    tensor = TensorSpec(("a",), None, "float32", (-1, 2))
    assert fill_tensor({"a": np.zeros((3, 8))}, tensor).shape == (3, 4, 2)
