"""Parquet files of other programs, as they are surveyed and read where they lie."""

from __future__ import annotations

import dataclasses
import datetime
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from column_kinds import row_bits, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdspark.data import parquet
from hvdspark.data.blocks import concatenate
from hvdspark.data.parquet import Survey, survey
from hvdspark.data.reader import ShardReader
from hvdspark.data.shards import plan_shards, reads_of
from hvdspark.errors import DataError, NullValueError, ValueRangeError
from hvdspark.plan import ColumnSpec


class Counted:
    """Stands before something and its parts, and counts how often a column of them is asked for."""

    looked = 0

    def __init__(self, behind: Any) -> None:
        self._behind = behind

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._behind, name)
        if name == "column":
            Counted.looked += 1
            return found
        if name == "row_group":
            return lambda index: Counted(found(index))
        return Counted(found) if name == "schema" else found


def test_a_survey_looks_at_each_column_of_a_footer_a_few_times_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"c{number}" for number in range(200)]
    table = pa.table(dict.fromkeys(names, np.arange(2, dtype="f4")))
    for file in ("a", "b"):
        pq.write_table(table, tmp_path / f"{file}.parquet")
    footer = parquet._footer
    monkeypatch.setattr(parquet, "_footer", lambda store, path: Counted(footer(store, path)))
    found = survey(str(tmp_path), [ColumnSpec(name, "scalar", "float32") for name in names])
    assert [group.rows for group in found.groups] == [2, 2]
    assert 2 * len(names) <= Counted.looked <= 10 * len(names)


def read(found: Survey) -> dict[str, Any]:
    """Read the rows as one rank does."""
    reads = reads_of(plan_shards(found.groups, 1, 10, keep_order=True), 0)
    with ShardReader(found.store, "", found.columns, reads) as reader:
        items = list(reader)
    return {name: concatenate([item[name] for item in items]) for name in items[0]}


TIME = ColumnSpec("t", "scalar", "int64", fed_as=("float32",))


def test_whole_numbers_that_the_model_would_round_are_found_in_the_footers(tmp_path: Path) -> None:
    for file, values in (("a", [1, 2]), ("b", [3, 4, 1_700_000_001])):
        pq.write_table(pa.table({"t": values}), tmp_path / f"{file}.parquet", row_group_size=2)
    with pytest.raises(ValueRangeError, match=r"'t' has the value 1700000001, which float32 cannot hold exactly"):
        survey(str(tmp_path), [TIME])


@pytest.mark.parametrize("statistics", [True, False])
def test_whole_numbers_that_the_model_would_round_are_found_by_the_ranks_where_footers_do_not_tell(
    tmp_path: Path, statistics: bool
) -> None:
    def write(*last: int) -> None:
        # A survey reads the first row group.
        table = pa.table({"t": [0, 0, 0, *last]})
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=3, write_statistics=statistics)

    write(0, 2**24 + 1, 2**25)
    found = survey(str(tmp_path), [TIME])
    with pytest.raises(ValueRangeError, match=r"'t' has the value 16777217"):
        read(found)
    write(0, 2**24 + 2, 2**25)
    assert read(survey(str(tmp_path), [TIME]))["t"].ravel().tolist() == [0, 0, 0, 0, 2**24 + 2, 2**25]


@dataclasses.dataclass(frozen=True)
class Family:
    """Arrow types that are one to Spark, and so may be in files side by side.

    Parameters
    ----------
    spec
        The column, as Spark's type of it says.
    types
        What a program may have written.
    value
        Draws a row.
    expected
        What it must be when it is read.
    """

    spec: ColumnSpec
    types: list[pa.DataType]
    value: st.SearchStrategy[Any]
    expected: Callable[[Any], Any]


# Spark's dtype of each Arrow number, whose unsigned ones it reads as the next wider.
NUMBERS = {
    "int8": "int8",
    "int16": "int16",
    "int32": "int32",
    "int64": "int64",
    "uint8": "int16",
    "uint16": "int32",
    "uint32": "int64",
    "float32": "float32",
    "float64": "float64",
    "bool": "bool",
}


def values_of(dtype: str) -> st.SearchStrategy[Any]:
    kind = np.dtype(dtype).kind
    if kind == "b":
        return st.booleans()
    if kind == "f":
        return st.floats(width=32 if dtype == "float32" else 64)
    return st.integers(int(np.iinfo(dtype).min), int(np.iinfo(dtype).max))


@st.composite
def numbers(draw: st.DrawFn) -> Family:
    dtype = draw(st.sampled_from(list(NUMBERS)))
    arrow, stored = pa.from_numpy_dtype(np.dtype(dtype)), NUMBERS[dtype]
    fill = draw(st.sampled_from([None, dtype == "bool" or 1]))
    types = [arrow] if dtype == "bool" else [arrow, pa.dictionary(pa.int32(), arrow)]
    if dtype == "int64":
        types += [pa.duration("ns"), pa.duration("us")]
    value = values_of(dtype)
    return Family(
        ColumnSpec("c", "scalar", stored, fill=fill),
        types,
        value if fill is None else st.none() | value,
        lambda found: np.array([fill if found is None else found], stored),
    )


@st.composite
def moments(draw: st.DrawFn) -> Family:
    unit = draw(st.sampled_from(["s", "ms", "us"]))
    zones = [None] if draw(st.booleans()) else ["UTC", "Europe/Berlin"]
    scale = {"s": 10**6, "ms": 1000, "us": 1}[unit]
    return Family(
        ColumnSpec("c", "timestamp", "int64"),
        [pa.timestamp(unit, zone) for zone in zones],
        st.integers(-(2**33), 2**33),
        lambda found: np.array([found * scale], "int64"),
    )


DAYS = Family(
    ColumnSpec("c", "date", "int32"),
    [pa.date32(), pa.date64()],
    st.dates(),
    lambda day: np.array([(day - datetime.date(1970, 1, 1)).days], "int32"),
)


@st.composite
def texts(draw: st.DrawFn) -> Family:
    fill = draw(st.sampled_from([None, "größe"]))
    strings = [pa.string(), pa.large_string(), pa.string_view()]
    return Family(
        ColumnSpec("c", "string", "string", storage="text", fill=fill),
        [*strings, *[pa.dictionary(pa.int32(), found) for found in strings[:2]]],
        st.text(max_size=9) if fill is None else st.none() | st.text(max_size=9),
        lambda text: (fill if text is None else text).encode(),
    )


# What begins so is taken for an encoded image.
JPEG = b"\xff\xd8\xff"


@st.composite
def raw_bytes(draw: st.DrawFn) -> Family:
    size = draw(st.integers(1, 4))
    return Family(
        ColumnSpec("c", "binary", "uint8", None),
        [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(size)],
        st.binary(min_size=size, max_size=size).filter(lambda value: not value.startswith(JPEG)),
        lambda cell: np.frombuffer(cell, "uint8"),
    )


@st.composite
def lists(draw: st.DrawFn) -> Family:
    dtype = draw(st.sampled_from(list(NUMBERS)))
    shape = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple))
    stored, value, fill = NUMBERS[dtype], values_of(dtype), draw(st.sampled_from([None, dtype == "bool" or 1]))
    types = [pa.from_numpy_dtype(np.dtype(dtype))]
    for size in reversed(shape):
        value = st.lists(value, min_size=size, max_size=size)
        makes = draw(st.lists(st.sampled_from([pa.list_, pa.large_list]), min_size=1, max_size=2))
        types = [make(inside) for make in makes for inside in types[:3]] + [pa.list_(types[0], size)]
    if len(shape) == 1 and dtype == "float32":
        types.append(pa.fixed_shape_tensor(pa.float32(), shape))
    spec = ColumnSpec("c", "array", stored, None, fill=fill)
    if fill is None:
        return Family(spec, types, value, lambda found: np.array(found, stored))
    return Family(
        spec.with_shape(shape),
        types,
        st.none() | value,
        lambda found: np.full(shape, fill, stored) if found is None else np.array(found, stored),
    )


@st.composite
def padded_lists(draw: st.DrawFn) -> Family:
    dtype = draw(st.sampled_from(["int32", "uint8", "float64"]))
    stored, size = NUMBERS[dtype], draw(st.integers(2, 4))
    arrow = pa.from_numpy_dtype(np.dtype(dtype))
    return Family(
        ColumnSpec("c", "array", stored, size, padding=7),
        [pa.list_(arrow), pa.large_list(arrow)],
        st.lists(values_of(dtype), max_size=size),
        lambda found: np.array(found + [7] * (size - len(found)), stored),
    )


families = st.one_of(numbers(), moments(), st.just(DAYS), texts(), raw_bytes(), lists(), padded_lists())


def arrow_of(values: list[Any], found: pa.DataType) -> pa.Array:
    if isinstance(found, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(found, pa.array(values, found.storage_type))
    if pa.types.is_dictionary(found):
        return pa.array(values, found.value_type).dictionary_encode()
    return pa.array(values, found)


@settings(max_examples=150)
@given(st.data(), families, st.integers(1, 4))
def test_what_other_programs_write_is_read_value_by_value_whatever_types_they_have_for_it(
    data: st.DataObject, family: Family, group_rows: int
) -> None:
    written: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        for file in range(2):
            values = data.draw(st.lists(family.value, min_size=1, max_size=5))
            table = pa.table({"c": arrow_of(values, data.draw(st.sampled_from(family.types)))})
            pq.write_table(table, f"{folder}/{file}.parquet", row_group_size=group_rows)
            written += values
        found = read(survey(folder, [family.spec]))["c"]
    assert rows_of(found) == [row_bits(family.expected(value)) for value in written]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([1, 2, None], pa.timestamp("ns")).cast(pa.timestamp("ns")), "column 'c' has 1 nulls"),
        (pa.nulls(3), "column 'c' has 3 nulls"),
        (pa.array([[1.0, 2.0], None, [3.0, 4.0]], pa.list_(pa.float64(), 2)), "column 'c' has 1 nulls"),
        (pa.array([[1.0, 2.0], [None, 1.0], [3.0, 4.0]], pa.large_list(pa.float64())), "column 'c' has 1 nulls"),
    ],
    ids=["moments", "nothing else", "fixed", "inside"],
)
def test_nulls_of_other_programs_are_counted(tmp_path: Path, column: pa.Array, message: str) -> None:
    kind: Any = "array" if pa.types.is_nested(column.type) else "scalar"
    pq.write_table(pa.table({"c": column}), tmp_path / "a.parquet")
    with pytest.raises(NullValueError, match=message):
        survey(str(tmp_path), [ColumnSpec("c", kind, "float64" if kind == "array" else "int64", size=None)])


def test_a_file_unlike_the_others_is_refused_by_its_name_and_what_to_do(tmp_path: Path) -> None:
    pq.write_table(pa.table({"c": [1, 2]}), tmp_path / "a.parquet")
    for other, message in (
        ({"c": ["1", "2"]}, r"b\.parquet .* holds other columns than the first one"),
        ({"d": [1, 2]}, r"b\.parquet .* holds other columns than the first one"),
        ({"c": [1.5, math.nan]}, r"column 'c' has the value 1\.5, which int64 cannot hold"),
        ({"c": [1.0, 2.0]}, None),
    ):
        pq.write_table(pa.table(other), tmp_path / "b.parquet")
        found = survey(str(tmp_path), [ColumnSpec("c", "scalar", "int64")])
        if message is None:
            assert read(found)["c"].ravel().tolist() == [1, 2, 1, 2]
        else:
            with pytest.raises(DataError, match=message):
                read(found)


@pytest.mark.parametrize("make", [pa.list_view, pa.large_list_view])
def test_views_of_lists_are_refused_by_their_column(tmp_path: Path, make: Callable[[pa.DataType], pa.DataType]) -> None:
    pq.write_table(pa.table({"c": pa.array([[[1]]], pa.list_(make(pa.int8())))}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"column 'c', .* views of lists are not read, write them as lists"):
        survey(str(tmp_path), [ColumnSpec("c", "array", "int8", None)])
