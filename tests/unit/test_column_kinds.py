"""Columns of every kind, through the real way of writing and reading, and what is refused of them."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from column_kinds import Column, encode, plan_of, rows_of, tables, vector_struct
from hypothesis import given, settings
from hypothesis import strategies as st
from pyspark.ml.linalg import Vectors
from pyspark.sql import types as T

from hvdspark import Store
from hvdspark.data.feed import RowFeed
from hvdspark.data.parquet import survey
from hvdspark.data.partitions import TRAIN, Split
from hvdspark.data.petastorm_compat import make_batch_reader, make_reader
from hvdspark.data.planning import FitDraft
from hvdspark.data.reader import ShardReader
from hvdspark.data.schema import check_columns, resolve
from hvdspark.data.shards import plan_shards, reads_of
from hvdspark.data.vectors import VECTOR_TYPE
from hvdspark.errors import ImageError, SchemaError
from hvdspark.plan import ColumnSpec, Manifest, ModelTensor, StoreRef
from hvdspark.predict import OutputColumn, ScorePlan, score_batch

Write = Callable[..., Any]


def to_batch(columns: dict[str, Column], rows: list[tuple[Any, ...]]) -> pa.RecordBatch:
    arrays = [column.to_arrow([row[place] for row in rows]) for place, column in enumerate(columns.values())]
    return pa.RecordBatch.from_arrays(arrays, names=list(columns))


@settings(max_examples=150)
@given(tables(), st.booleans(), st.sampled_from([1, 200, 1 << 20]), st.integers(1, 2))
def test_every_value_of_every_kind_comes_back_once(
    write_dataset: Write, table: Any, sparse: bool, group_bytes: int, ranks: int
) -> None:
    columns, parts = table
    specs, batch = plan_of(columns, sparse)
    written = write_dataset(
        specs, [[to_batch(columns, rows) for rows in batches] for batches in parts], group_bytes=group_bytes
    )
    resolve(batch, written.manifest.columns)
    found: Counter[Any] = Counter()
    plan = plan_shards(written.manifest.splits[TRAIN], ranks, 3, keep_order=True)
    for rank in range(ranks):
        with ShardReader(written.store, written.dataset, written.manifest.columns, reads_of(plan, rank)) as reader:
            for blocks in reader:
                found.update(zip(*[rows_of(blocks[name]) for name in columns], strict=True))
    assert found == expected_of(columns, parts)


def expected_of(columns: dict[str, Column], parts: Any) -> Counter[Any]:
    return Counter(
        tuple(column.row(value) for column, value in zip(columns.values(), row, strict=True))
        for batches in parts
        for rows in batches
        for row in rows
    )


@settings(max_examples=60)
@given(tables(), st.booleans())
def test_every_value_of_every_kind_goes_straight_to_a_rank(table: Any, sparse: bool) -> None:
    columns, parts = table
    parts = [batches for batches in parts if any(batches)]
    specs, batch = plan_of(columns, sparse)
    draft = FitDraft("run", StoreRef("unused"), specs, batch, Split(), len(parts), 3, 3, 1, True, 0)
    feed = RowFeed(tuple(columns), draft)
    found: Counter[Any] = Counter()
    with contextlib.ExitStack() as stack:
        taken = [
            stack.enter_context(feed.taken(by_place(to_batch(columns, rows)) for rows in batches)) for batches in parts
        ]
        for rank, rows in enumerate(taken):
            plan = rows.plan([other.report for other in taken])
            assert plan.data is not None
            reads = reads_of(plan.train, rank)
            with ShardReader(Store.from_ref(plan.data), plan.dataset, plan.columns, reads) as reader:
                for blocks in reader:
                    found.update(zip(*[rows_of(blocks[name]) for name in columns], strict=True))
    assert found == expected_of(columns, parts)


def by_place(batch: pa.RecordBatch) -> pa.RecordBatch:
    return batch.rename_columns([f"c{place}" for place in range(batch.num_columns)])


@settings(max_examples=60)
@given(tables(), st.booleans(), st.integers(1, 3))
def test_every_value_of_every_kind_is_read_where_it_lies(table: Any, sparse: bool, group_rows: int) -> None:
    columns, parts = table
    specs, _ = plan_of(columns, sparse)
    found: Counter[Any] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number, batches in enumerate(parts):
            whole = pa.Table.from_batches(
                [to_batch(columns, rows) for rows in batches if rows] or [to_batch(columns, [])]
            )
            pq.write_table(whole, f"{folder}/{number}.parquet", row_group_size=group_rows)
        there = survey(folder, specs)
        reads = reads_of(plan_shards(there.groups, 1, 3, keep_order=True), 0)
        with ShardReader(there.store, "", there.columns, reads) as reader:
            for blocks in reader:
                found.update(zip(*[rows_of(blocks[name]) for name in columns], strict=True))
    assert found == expected_of(columns, parts)


def stored_kinds(write_dataset: Write) -> tuple[Any, dict[str, list[Any]]]:
    """Write three rows of every way in which a column is stored, and give what they are."""
    pixels = np.arange(36, dtype="uint8").reshape(3, 2, 2, 3)
    sparse = [Vectors.sparse(5, {1: 0.5}), Vectors.dense([0, -0.0, 1, 0, 0]), Vectors.sparse(5, {})]
    values: dict[str, list[Any]] = {
        "day": [-1, 0, 20_000],
        "moment": [-1, 0, 2**53 + 1],
        "text": ["", "grö\0ße", "東京"],
        "matrix": [[[1, 2], [3, 4], [5, 6]]] * 3,
        "png": [encode(row, "PNG") for row in pixels],
        "raw": [row.tobytes() for row in pixels],
        "sparse": sparse,
    }
    columns = [
        ColumnSpec("day", "date", "int32"),
        ColumnSpec("moment", "timestamp", "int64"),
        ColumnSpec("text", "string", "string", storage="text"),
        ColumnSpec("matrix", "array", "int16", None),
        ColumnSpec("png", "binary", "uint8", None),
        ColumnSpec("raw", "binary", "uint8").with_shape((2, 2, 3)),
        ColumnSpec("sparse", "vector", "float32", None, storage="sparse"),
    ]
    table = pa.RecordBatch.from_pydict(
        {
            "day": pa.array(values["day"], pa.int32()).view(pa.date32()),
            "moment": pa.array(values["moment"], pa.int64()).view(pa.timestamp("us")),
            "text": values["text"],
            "matrix": pa.array(values["matrix"], pa.list_(pa.list_(pa.int16()))),
            "png": pa.array(values["png"], pa.binary()),
            "raw": pa.array(values["raw"], pa.binary()),
            "sparse": pa.array([vector_struct(value) for value in sparse], VECTOR_TYPE),
        }
    )
    return write_dataset(columns, [[table.slice(0, 2)], [table.slice(2)]]), values


def same_entries(found: Any, vector: Any) -> bool:
    again = np.zeros(vector.size if hasattr(vector, "size") else len(vector), "float32")
    again[found["index"]] = found["value"]
    return again.tobytes() == vector.toArray().astype("float32").tobytes()


def test_the_manifest_states_how_every_column_is_stored(write_dataset: Write) -> None:
    written, _ = stored_kinds(write_dataset)
    assert {spec.name: (spec.dtype, spec.row_shape, spec.storage) for spec in written.manifest.columns} == {
        "day": ("int32", (1,), "dense"),
        "moment": ("int64", (1,), "dense"),
        "text": ("string", (1,), "text"),
        "matrix": ("int16", (3, 2), "dense"),
        "png": ("uint8", (2, 2, 3), "png"),
        "raw": ("uint8", (2, 2, 3), "dense"),
        "sparse": ("float32", (5,), "sparse"),
    }
    assert Manifest.from_json(written.manifest.to_json()) == written.manifest


def test_stock_make_reader_opens_columns_of_every_kind(write_dataset: Write) -> None:
    written, values = stored_kinds(write_dataset)
    url = f"file://{written.store.url_of(written.dataset, TRAIN)}"
    with make_reader(url, num_epochs=1, reader_pool_type="dummy", shuffle_row_groups=False) as reader:
        rows = list(reader)
    for name in ("day", "moment", "text", "png"):
        assert [getattr(row, name) for row in rows] == values[name]
    assert [row.matrix.tolist() for row in rows] == values["matrix"]
    assert [(row.raw.shape, row.raw.tobytes()) for row in rows] == [((2, 2, 3), cell) for cell in values["raw"]]
    assert all(same_entries(row.sparse, vector) for row, vector in zip(rows, values["sparse"], strict=True))


@pytest.mark.filterwarnings("ignore:Please use make_reader:UserWarning:petastorm.reader")
def test_stock_make_batch_reader_opens_columns_of_every_kind(write_dataset: Write) -> None:
    written, values = stored_kinds(write_dataset)
    url = f"file://{written.store.url_of(written.dataset, TRAIN)}"
    with make_batch_reader(url, num_epochs=1, reader_pool_type="dummy", shuffle_row_groups=False) as reader:
        batches = list(reader)
    found = {name: [value for item in batches for value in getattr(item, name)] for name in values}
    for name in ("day", "moment", "text", "png"):
        assert found[name] == values[name]
    decoded = {
        name: [np.load(io.BytesIO(cell), allow_pickle=False) for cell in found[name]]
        for name in ("matrix", "raw", "sparse")
    }
    assert [value.tolist() for value in decoded["matrix"]] == values["matrix"]
    assert [value.tobytes() for value in decoded["raw"]] == values["raw"]
    assert all(same_entries(*pair) for pair in zip(decoded["sparse"], values["sparse"], strict=True))


PNG = ColumnSpec("b", "binary", "uint8", None)


def pictures(*cells: bytes) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict({"b": pa.array(cells, pa.binary())})


@pytest.mark.parametrize(
    ("partitions", "message"),
    [
        ([[(2, 2), (2, 3)]], "images of different shapes: 2x2x3 and 2x3x3"),
        ([[(2, 2)], [(2, 3)]], "PNG of shape 2x2x3 and PNG of shape 2x3x3"),
        ([[(2, 2)], [bytes(12)]], "PNG of shape 2x2x3 and plain values of shape 12"),
        ([[(2, 2)], [b"no image"]], "PNG of shape 2x2x3 and plain values of shape 8"),
        ([[(2, 2), b"no image"]], "1 PNG images and 1 rows of raw bytes"),
    ],
    ids=["in a batch", "between partitions", "raw and encoded", "garbage elsewhere", "garbage"],
)
def test_images_that_differ_are_refused_wherever_they_are(
    write_dataset: Write, partitions: list[list[Any]], message: str
) -> None:
    def cell(given: Any) -> bytes:
        return given if isinstance(given, bytes) else encode(np.zeros((*given, 3), "uint8"), "PNG")

    with pytest.raises(ImageError, match=rf"column 'b' .*{message}") as caught:
        write_dataset([PNG], [[pictures(*map(cell, cells))] for cells in partitions])
    assert caught.value.column == "b"


def test_images_may_differ_from_the_model_only_until_the_shapes_are_resolved(write_dataset: Write) -> None:
    schema = T.StructType([T.StructField("b", T.BinaryType())])
    specs, batch = check_columns(schema, feature_cols=["b"], inputs=[ModelTensor("x", (3, 2, 1), "float32")])
    for shape in ((2, 3, 1), (3, 2, 3)):
        written = write_dataset(specs, [[pictures(encode(np.zeros(shape, "uint8"), "PNG"))]])
        with pytest.raises(SchemaError, match=r"columns b hold .* but the model takes 6 \(shape \(3, 2, 1\)\)"):
            resolve(batch, written.manifest.columns)


@settings(max_examples=40)
@given(tables(), st.integers(1, 4))
def test_transform_feeds_the_model_what_fit_does(table: Any, batch_rows: int) -> None:
    columns, parts = table
    specs, batch = plan_of(columns)
    rows = [row for batches in parts for rows in batches for row in rows]
    fed: list[list[Any]] = []

    def scorer(inputs: Any) -> Any:
        assert len(inputs[0]) <= batch_rows
        fed.append(list(inputs))
        return [np.zeros((len(inputs[0]), 1))]

    plan = ScorePlan(specs, batch.features, (OutputColumn("y", "scalar", (1,), "float64"),), batch_rows, "a:b", "key")
    assert score_batch(to_batch(columns, rows), plan, scorer).num_rows == len(rows)
    for place, (column, tensor) in enumerate(zip(columns.values(), batch.features, strict=True)):
        found = np.concatenate([inputs[place] for inputs in fed])
        shape, dtype = column.takes
        assert (found.shape[1:], found.dtype) == (shape, np.dtype("O" if dtype == "string" else dtype))
        for value, row in zip(found, rows, strict=True):
            wanted = column.expected(column.fill if row[place] is None else row[place])
            wanted = np.full(shape, wanted, object) if isinstance(wanted, bytes) else wanted.reshape(shape)
            np.testing.assert_array_equal(value, wanted.astype(found.dtype))
        assert tensor.shape == shape
