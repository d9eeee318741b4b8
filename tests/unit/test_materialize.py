"""The way of the rows to Parquet and back, over partitions that need no Spark."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import pickle
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from hvdspark import Store
from hvdspark.data import petastorm_compat  # noqa: F401  (must come before petastorm)
from hvdspark.data.materialize import DATASETS, MANIFEST, load_manifest, materialize, require_files
from hvdspark.data.partitions import TRAIN, VAL, Split
from hvdspark.data.reader import ShardReader, read_group
from hvdspark.data.shards import plan_shards, reads_of
from hvdspark.data.vectors import VECTOR_TYPE
from hvdspark.errors import CorruptDatasetError, EmptyDatasetError, NullValueError, RaggedArrayError, ValueRangeError
from hvdspark.plan import ColumnSpec, GroupRead, Manifest

Block = npt.NDArray[Any]
Blocks = dict[str, Block]
Write = Callable[..., Any]

DTYPES = ("bool", "int8", "int16", "int32", "int64", "float32", "float64")
X = ColumnSpec("x", "scalar", "int64")
ARRAY = ColumnSpec("a", "array", "float32", None)

# Values that a careless way would change: NaN with its payload, infinities, negative zero, the ends of integers.
SPECIAL = {
    "float64": np.array([0x7FF8DEADBEEF0001, 0x7FF0 << 48, 0xFFF0 << 48, 1 << 63, 1], "uint64").view("float64"),
    "float32": np.array([0x7FC0BEEF, 0x7F800000, 0xFF800000, 0x80000000, 1], "uint32").view("float32"),
    "int64": np.array([-(2**63), 2**63 - 1, -1, 0, 2**53 + 1]),
    "int32": np.array([-(2**31), 2**31 - 1, -1, 0, 1], "int32"),
}


def batch(**columns: Any) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict(columns)


def lists_of(block: Block) -> pa.ListArray:
    rows, size = block.shape
    return pa.ListArray.from_arrays(pa.array(np.arange(rows + 1, dtype="int32") * size), pa.array(block.reshape(-1)))


def vectors_of(block: Block) -> pa.StructArray:
    """Odd rows sparse, even ones dense; a sparse vector keeps what is not positive zero."""
    rows: list[dict[str, Any]] = []
    for number, row in enumerate(block):
        if number % 2:
            kept = np.flatnonzero(row.view("uint64"))
            rows.append({"type": 0, "size": len(row), "indices": kept, "values": row[kept]})
        else:
            rows.append({"type": 1, "size": None, "indices": None, "values": row})
    return pa.array(rows, type=VECTOR_TYPE)


def to_arrow(spec: ColumnSpec, block: Block) -> pa.Array:
    if spec.kind == "scalar":
        return pa.array(block[:, 0])
    return lists_of(block) if spec.kind == "array" else vectors_of(block)


@st.composite
def column_sets(draw: st.DrawFn) -> tuple[ColumnSpec, ...]:
    found = []
    for number in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(["scalar", "array", "vector"]))
        dtype = "float64" if kind == "vector" else draw(st.sampled_from(DTYPES))
        size = 1 if kind == "scalar" else draw(st.integers(1, 5))
        found.append(ColumnSpec(f"c{number}", kind, dtype, size))  # type: ignore[arg-type]
    return tuple(found)


@st.composite
def tables(draw: st.DrawFn) -> tuple[tuple[ColumnSpec, ...], list[list[Blocks]]]:
    """Draw columns and, by partition, batches of rows; some of either empty."""
    columns = draw(column_sets())
    sizes = draw(st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=4))
    if not sum(map(sum, sizes)):
        sizes.append([draw(st.integers(1, 5))])

    def block(spec: ColumnSpec, rows: int) -> Block:
        special = SPECIAL.get(spec.dtype)
        elements = st.sampled_from(special) | hnp.from_dtype(np.dtype(spec.dtype)) if special is not None else None
        return draw(hnp.arrays(spec.dtype, (rows, spec.size), elements=elements))

    return columns, [[{spec.name: block(spec, rows) for spec in columns} for rows in batches] for batches in sizes]


def to_partitions(columns: Sequence[ColumnSpec], parts: list[list[Blocks]]) -> list[list[pa.RecordBatch]]:
    return [
        [batch(**{spec.name: to_arrow(spec, blocks[spec.name]) for spec in columns}) for blocks in batches]
        for batches in parts
    ]


def row_bytes(columns: Sequence[ColumnSpec], blocks: Blocks) -> list[bytes]:
    """Give each row as one string of bytes, so that NaNs and negative zeros are told apart."""
    wide = [np.ascontiguousarray(blocks[spec.name]).view("uint8").reshape(-1, spec_bytes(spec)) for spec in columns]
    return [row.tobytes() for row in np.concatenate(wide, axis=1)]


def spec_bytes(spec: ColumnSpec) -> int:
    assert spec.size is not None
    return np.dtype(spec.dtype).itemsize * spec.size


def read_all(written: Any, split: str, rank: int = 0, size: int = 1, workers: int = 2) -> Iterator[Blocks]:
    plan = plan_shards(written.manifest.splits[split], size, 3, keep_order=True)
    columns = written.manifest.columns
    reads = reads_of(plan, rank)
    with ShardReader(written.store, written.dataset, columns, reads, workers, verify=True) as reader:
        yield from reader


def joined(blocks: Iterator[Blocks]) -> Blocks:
    found = list(blocks)
    return {name: np.concatenate([item[name] for item in found]) for name in found[0]}


def files_in(store: Store) -> list[str]:
    return sorted(str(path.relative_to(store.url)) for path in Path(store.url).rglob("*") if path.is_file())


@settings(max_examples=60)
@given(tables(), st.integers(1, 3), st.sampled_from([1, 64, 1 << 20]))
def test_every_row_comes_back_once_and_bit_for_bit(
    write_dataset: Write, table: tuple[tuple[ColumnSpec, ...], list[list[Blocks]]], ranks: int, group_bytes: int
) -> None:
    columns, parts = table
    written = write_dataset(columns, to_partitions(columns, parts), group_bytes=group_bytes)
    assert written.manifest.columns == columns
    found = Counter(
        row
        for rank in range(ranks)
        for blocks in read_all(written, TRAIN, rank, ranks)
        for row in row_bytes(columns, blocks)
    )
    assert found == Counter(row for batches in parts for blocks in batches for row in row_bytes(columns, blocks))


def test_one_rank_reads_the_rows_in_the_order_of_partitions_and_batches(write_dataset: Write) -> None:
    partitions = [[batch(x=[1, 2]), batch(x=[3])], [], [batch(x=np.array([], "int64"))], [batch(x=[4, 5, 6])]]
    written = write_dataset([X], partitions, group_bytes=16)
    assert joined(read_all(written, TRAIN, workers=1))["x"].ravel().tolist() == [1, 2, 3, 4, 5, 6]


def test_row_groups_have_the_size_asked_for_across_batches(write_dataset: Write) -> None:
    written = write_dataset([X], [[batch(x=[1, 2, 3]), batch(x=[4, 5, 6, 7])]], group_bytes=3 * 8)
    assert [group.rows for group in written.manifest.splits[TRAIN]] == [3, 3, 1]
    assert written.manifest.splits[VAL] == ()


def test_the_manifest_that_is_read_back_is_the_one_that_was_returned(write_dataset: Write) -> None:
    written = write_dataset([X, ARRAY], [[batch(x=[1, 2], a=[[1.0, 2.0], [3.0, 4.0]])]])
    assert load_manifest(written.store, written.dataset) == written.manifest
    assert written.manifest.columns[1].size == 2


def test_columns_that_are_not_asked_for_are_not_stored(write_dataset: Write) -> None:
    written = write_dataset([X], [[batch(x=[1, 2], v=[0, 1], secret=["a", "b"])]], Split(column="v"))
    for group in (*written.manifest.splits[TRAIN], *written.manifest.splits[VAL]):
        path = Path(written.store.url, written.dataset, group.path)
        assert pq.read_schema(path).names == ["x"]


@pytest.mark.parametrize("name", ["a.b", "a b", "a`b", "größe", "_c0", "class", "a/b", "'", "x.y.z", "a[0]", "fields"])
def test_columns_may_have_any_name(write_dataset: Write, name: str) -> None:
    columns = [ColumnSpec(name, "scalar", "int64"), ColumnSpec("a", "array", "float32", None)]
    written = write_dataset(columns, [[batch(**{name: [1, 2], "a": [[1.0, 2.0], [3.0, 4.0]]})]])
    found = joined(read_all(written, TRAIN))
    assert found[name].tolist() == [[1], [2]]
    assert found["a"].tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_a_column_whose_name_begins_another_is_not_mixed_up_with_it(write_dataset: Write) -> None:
    columns = [ColumnSpec(name, "scalar", "int64") for name in ("a.b", "a", "a.b.c")]
    written = write_dataset(columns, [[batch(**{"a": [1], "a.b": [2], "a.b.c": [3]})]])
    group = written.manifest.splits[TRAIN][0]
    for spec, expected in zip(columns, (2, 1, 3), strict=True):
        found = read_group(written.store, written.dataset, [spec], GroupRead(group, ((0, 1),)))
        assert {name: block.tolist() for name, block in found.items()} == {spec.name: [[expected]]}


def test_arrays_of_one_value_are_stored_as_numbers(write_dataset: Write) -> None:
    written = write_dataset([ARRAY], [[batch(a=[[1.5], [2.5]])]])
    assert written.manifest.columns[0].size == 1
    assert joined(read_all(written, TRAIN))["a"].tolist() == [[1.5], [2.5]]


def nulls(values: list[Any], kind: pa.DataType = pa.int64()) -> pa.Array:  # noqa: B008  (a constant)
    return pa.array(values, type=kind)


def test_nulls_are_counted_over_all_batches_and_partitions(write_dataset: Write) -> None:
    floats = pa.list_(pa.float32())
    partitions = [
        [batch(x=nulls([1, None]), a=nulls([[1.0], [2.0]], floats)), batch(x=nulls([None]), a=nulls([None], floats))],
        [batch(x=nulls([1]), a=nulls([[1.0]], floats))],
        [batch(x=nulls([None, None, None]), a=nulls([[None], [1.0], [1.0]], floats))],
    ]
    with pytest.raises(NullValueError, match=r"column 'x' has 5 nulls \(also: a\).*dropna.*fillna") as caught:
        write_dataset([X, ARRAY], partitions)
    assert (caught.value.column, caught.value.count) == ("x", 5)


def test_nulls_of_a_validation_column_are_refused(write_dataset: Write) -> None:
    partitions = [[batch(x=[1, 2], v=nulls([0, 1]))], [batch(x=[1, 2], v=nulls([None, 1]))]]
    with pytest.raises(NullValueError, match=r"column 'v' has 1 nulls"):
        write_dataset([X], partitions, Split(column="v"))


def test_nulls_of_a_validation_column_are_counted_over_all_batches(write_dataset: Write) -> None:
    partitions = [[batch(x=[1, 2], v=nulls([0, None])), batch(x=[1, 2], v=nulls([None, None]))]]
    with pytest.raises(NullValueError) as caught:
        write_dataset([X], partitions, Split(column="v"))
    assert caught.value.count == 3


def test_nulls_of_a_boolean_validation_column_are_refused(write_dataset: Write) -> None:
    partitions = [[batch(x=[1, 2], v=nulls([True, None], pa.bool_()))]]
    with pytest.raises(NullValueError, match=r"column 'v' has 1 nulls"):
        write_dataset([X], partitions, Split(column="v"))


@pytest.mark.parametrize(
    "partitions",
    [
        [[batch(a=[[1.0, 2.0], [1.0, 2.0, 3.0]])]],
        [[batch(a=[[1.0, 2.0]]), batch(a=[[1.0, 2.0, 3.0]])]],
        [[batch(a=[[1.0, 2.0]])], [], [batch(a=[[1.0, 2.0, 3.0]])]],
    ],
    ids=["in a batch", "between batches", "between partitions"],
)
def test_ragged_arrays_are_found_wherever_they_are(
    write_dataset: Write, partitions: list[list[pa.RecordBatch]]
) -> None:
    with pytest.raises(RaggedArrayError, match=r"'a' has rows of different lengths: expected 2 .*found 3") as caught:
        write_dataset([ARRAY], partitions)
    assert (caught.value.column, caught.value.lengths) == ("a", (2, 3))


def test_a_stated_size_is_held_to(write_dataset: Write) -> None:
    with pytest.raises(RaggedArrayError, match=r"expected 3 values, found 2"):
        write_dataset([ColumnSpec("a", "array", "float32", 3)], [[batch(a=[[1.0, 2.0]])]])


EMPTY_ARRAYS = pa.array([[], []], type=pa.list_(pa.float32()))


def test_empty_arrays_are_refused(write_dataset: Write) -> None:
    with pytest.raises(RaggedArrayError, match=r"'a' holds empty arrays"):
        write_dataset([ARRAY, X], [[batch(a=EMPTY_ARRAYS, x=[1, 2])]])


def test_empty_arrays_are_refused_where_nothing_else_is_stored(write_dataset: Write) -> None:
    with pytest.raises(RaggedArrayError, match=r"'a' holds empty arrays"):
        write_dataset([ARRAY], [[batch(a=EMPTY_ARRAYS)]])


@pytest.mark.parametrize("partitions", [[], [[]], [[], [batch(x=np.array([], "int64"))]]], ids=len)
def test_no_rows_are_refused(write_dataset: Write, partitions: list[list[pa.RecordBatch]]) -> None:
    with pytest.raises(EmptyDatasetError, match=r"the DataFrame is empty"):
        write_dataset([X], partitions)


def test_a_split_must_leave_rows_on_both_sides(write_dataset: Write) -> None:
    with pytest.raises(EmptyDatasetError, match=r"all 2 rows went to validation"):
        write_dataset([X], [[batch(x=[1, 2], v=[1, 1])]], Split(column="v"))
    with pytest.raises(EmptyDatasetError, match=r"none of the 2 rows went to validation"):
        write_dataset([X], [[batch(x=[1, 2], v=[0, 0])]], Split(column="v"))
    with pytest.raises(EmptyDatasetError, match=r"none of the 1 rows went to validation"):
        write_dataset([X], [[batch(x=[1])]], Split(fraction=0.01))


class BrokenError(Exception):
    pass


class Breaking:
    """A partition whose rows end in an error, as an executor's would; notes which files there were then."""

    def __init__(self, store: Store, *batches: pa.RecordBatch) -> None:
        self._store = store
        self._batches = batches
        self.files: list[str] = []

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        yield from self._batches
        self.files = files_in(self._store)
        raise BrokenError


class BreakingFrame:
    """Hands on a task's rows without touching them, so that they break where they are read."""

    def __init__(self, frame: Any) -> None:
        self._frame = frame

    def select(self, *_names: str) -> Any:
        return self._frame


@pytest.mark.parametrize(("before", "files"), [(0, 1), (1, 2), (5, 3)])
def test_a_task_that_breaks_leaves_no_file_and_no_manifest(
    tmp_path: Path, arrow_frame: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, before: int, files: int
) -> None:
    monkeypatch.setattr("hvdspark.data.files.ROW_GROUP_BYTES", 16)
    store = Store.create(tmp_path / "store")
    breaking = Breaking(store, *[batch(x=[4, 5, 6], v=[0, 0, int(number > 1)]) for number in range(before)])
    frame: Any = BreakingFrame(arrow_frame([[batch(x=[1, 2, 3], v=[0, 0, 0])], breaking]))
    with pytest.raises(BrokenError):
        materialize(frame, [X], Split(column="v"), store)
    assert len(breaking.files) == files
    assert files_in(store) == []
    assert store.list(DATASETS) == []


@pytest.mark.parametrize(
    ("rows", "error"),
    [(batch(x=nulls([1, None])), NullValueError), (batch(x=np.array([], "int64")), EmptyDatasetError)],
    ids=["nulls", "empty"],
)
def test_rows_that_are_refused_leave_nothing_in_the_store(
    tmp_path: Path, arrow_frame: Callable[..., Any], rows: pa.RecordBatch, error: type[Exception]
) -> None:
    store = Store.create(tmp_path / "store")
    with pytest.raises(error):
        materialize(arrow_frame([[batch(x=[1, 2, 3])] if error is NullValueError else [], [rows]]), [X], Split(), store)
    assert files_in(store) == []


# The writer that is dropped tries to write its end when it is collected.
def test_a_disk_that_is_full_leaves_no_file(
    tmp_path: Path, arrow_frame: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: Any, **_kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    store = Store.create(tmp_path / "store")
    with pytest.raises(OSError, match=r"No space left"):
        materialize(arrow_frame([[batch(x=[1, 2, 3])]]), [X], Split(), store)
    assert files_in(store) == []


def held_out(written: Any) -> list[int]:
    return sorted(joined(read_all(written, VAL))["x"].ravel().tolist())


def test_a_random_split_depends_on_the_seed_alone(write_dataset: Write) -> None:
    numbers = np.arange(3000)
    whole = [[batch(x=numbers[:1000])], [batch(x=numbers[1000:])]]
    pieces = [
        [batch(x=numbers[:10]), batch(x=numbers[10:1000])],
        [batch(x=part) for part in np.split(numbers[1000:], 8)],
    ]
    first = held_out(write_dataset([X], whole, Split(fraction=0.2, seed=7)))
    assert held_out(write_dataset([X], pieces, Split(fraction=0.2, seed=7), group_bytes=80)) == first
    assert held_out(write_dataset([X], whole, Split(fraction=0.2, seed=8))) != first


def test_a_random_split_holds_out_its_fraction_in_every_partition_and_loses_no_row(write_dataset: Write) -> None:
    numbers = np.arange(4000)
    written = write_dataset([X], [[batch(x=part)] for part in np.split(numbers, 2)], Split(fraction=0.25, seed=3))
    val = held_out(written)
    train = joined(read_all(written, TRAIN))["x"].ravel().tolist()
    assert sorted(train + val) == numbers.tolist()
    counts = [sum(row < 2000 for row in val), sum(row >= 2000 for row in val)]
    # 500 are expected of each 2,000, with a standard deviation of 19.4.
    assert all(400 < count < 600 for count in counts)
    assert [row for row in val if row < 2000] != [row - 2000 for row in val if row >= 2000]


@pytest.mark.parametrize(
    "marks",
    [
        pa.array([0, 1, 0, 0, 1], pa.int8()),
        pa.array([0.0, 1.0, -0.0, 0.0, 1.0], pa.float64()),
        pa.array([False, True, False, False, True]),
    ],
    ids=lambda value: str(value.type),
)
def test_a_column_of_marks_splits_the_rows(write_dataset: Write, marks: pa.Array) -> None:
    written = write_dataset([X], [[batch(x=[1, 2, 3], v=marks[:3])], [batch(x=[4, 5], v=marks[3:])]], Split(column="v"))
    assert held_out(written) == [2, 5]
    assert joined(read_all(written, TRAIN, workers=1))["x"].ravel().tolist() == [1, 3, 4]


def test_a_column_of_marks_may_be_a_feature_too(write_dataset: Write) -> None:
    columns = [ColumnSpec("v", "scalar", "float32")]
    written = write_dataset(columns, [[batch(v=pa.array([0.0, 2.0, 0.0], pa.float32()))]], Split(column="v"))
    assert joined(read_all(written, TRAIN))["v"].tolist() == [[0.0], [0.0]]
    assert joined(read_all(written, VAL))["v"].tolist() == [[2.0]]


PETASTORM_TABLE = {
    "flag": np.array([True, False, True, False, True]),
    "i8": np.array([-128, 0, 1, 2, 127], "int8"),
    "i16": np.array([-5, 0, 1, 2, 5], "int16"),
    "i32": SPECIAL["int32"],
    "i64": SPECIAL["int64"],
    "f32": SPECIAL["float32"],
    "f64": SPECIAL["float64"],
}
FLOATS = np.arange(15, dtype="float32").reshape(5, 3)
VECTORS = np.arange(20.0).reshape(5, 4) * (np.arange(20).reshape(5, 4) % 2)


@pytest.fixture(scope="module")
def mixed(write_dataset: Write) -> Any:
    """Five rows of every kind of column, over two partitions and several row groups."""
    columns = [ColumnSpec(name, "scalar", values.dtype.name) for name, values in PETASTORM_TABLE.items()]
    columns += [ColumnSpec("floats", "array", "float32", None), ColumnSpec("vector", "vector", "float64", None)]
    table = {**{name: pa.array(values) for name, values in PETASTORM_TABLE.items()}, "floats": lists_of(FLOATS)}
    whole = batch(**table, vector=vectors_of(VECTORS))
    return write_dataset(columns, [[whole.slice(0, 3)], [whole.slice(3)]], group_bytes=160)


def url_of(written: Any, split: str = TRAIN) -> str:
    return f"file://{written.store.url_of(written.dataset, split)}"


def test_stock_make_reader_opens_the_dataset_with_equal_values(mixed: Any) -> None:
    from petastorm import make_reader

    with make_reader(url_of(mixed), num_epochs=1, reader_pool_type="dummy", shuffle_row_groups=False) as reader:
        rows = list(reader)
    assert len(mixed.manifest.splits[TRAIN]) > 2
    for name, values in PETASTORM_TABLE.items():
        found = np.array([getattr(row, name) for row in rows])
        assert (found.dtype, found.tobytes()) == (values.dtype, values.tobytes())
    for name, block in (("floats", FLOATS), ("vector", VECTORS)):
        found = np.stack([getattr(row, name) for row in rows])
        assert (found.dtype, found.tobytes()) == (block.dtype, block.tobytes())


@pytest.mark.filterwarnings("ignore:Please use make_reader:UserWarning:petastorm.reader")
def test_stock_make_batch_reader_opens_the_dataset_with_equal_values(mixed: Any) -> None:
    from petastorm import make_batch_reader

    with make_batch_reader(url_of(mixed), num_epochs=1, reader_pool_type="dummy", shuffle_row_groups=False) as reader:
        batches = list(reader)
    for name, values in PETASTORM_TABLE.items():
        found = np.concatenate([getattr(item, name) for item in batches])
        assert (found.dtype, found.tobytes()) == (values.dtype, values.tobytes())
    for name, block in (("floats", FLOATS), ("vector", VECTORS)):
        cells = [cell for item in batches for cell in getattr(item, name)]
        found = np.stack([np.load(io.BytesIO(cell), allow_pickle=False) for cell in cells])
        assert (found.dtype, found.tobytes()) == (block.dtype, block.tobytes())


class Trap:
    """Its pickle makes a folder when it is loaded."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (self._folder,)


@pytest.fixture
def copied(mixed: Any, tmp_path: Path) -> Any:
    """A dataset to damage."""
    shutil.copytree(mixed.store.url, tmp_path / "store")
    return type(mixed)(Store.create(tmp_path / "store"), mixed.dataset, mixed.manifest)


def test_a_pickle_in_the_metadata_is_never_loaded_by_our_reader(copied: Any, tmp_path: Path) -> None:
    from petastorm.etl.dataset_metadata import UNISCHEMA_KEY

    common = Path(copied.store.url, copied.dataset, TRAIN, "_common_metadata")
    schema = pq.read_schema(common)
    planted = {**schema.metadata, UNISCHEMA_KEY: pickle.dumps(Trap(str(tmp_path / "sprung")))}
    pq.write_metadata(schema.with_metadata(planted), common)
    found = joined(read_all(copied, TRAIN, workers=1))
    assert found["i64"].ravel().tolist() == SPECIAL["int64"].tolist()
    assert not (tmp_path / "sprung").exists()
    pickle.loads(pq.read_schema(common).metadata[UNISCHEMA_KEY])
    assert (tmp_path / "sprung").exists(), "the trap is none, so that this test proves nothing"


def data_files(written: Any) -> list[Path]:
    return [Path(written.store.url, written.dataset, group.path) for group in written.manifest.splits[TRAIN]]


def cut_in_half(path: Path, _others: list[Path]) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_tail(path: Path, _others: list[Path]) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def overwrite_start(path: Path, _others: list[Path]) -> None:
    data = bytearray(path.read_bytes())
    data[4:200] = bytes(196)
    path.write_bytes(data)


def overwrite_footer(path: Path, _others: list[Path]) -> None:
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[-8:-4], "little")
    data[-8 - length : -8] = bytes(length)
    path.write_bytes(data)


def make_empty(path: Path, _others: list[Path]) -> None:
    path.write_bytes(b"")


def take_away(path: Path, _others: list[Path]) -> None:
    path.unlink()


def make_a_folder(path: Path, _others: list[Path]) -> None:
    path.unlink()
    path.mkdir()


def exchange_for_another_part(path: Path, others: list[Path]) -> None:
    path.write_bytes(others[0].read_bytes())


def drop_a_column(path: Path, _others: list[Path]) -> None:
    rewrite(path, lambda table: table.drop_columns(["f64"]))


def widen_a_column(path: Path, _others: list[Path]) -> None:
    rewrite(path, lambda table: table.set_column(table.schema.names.index("f32"), "f32", table["f64"]))


def swap_cells(path: Path, _others: list[Path]) -> None:
    rewrite(path, lambda table: table.set_column(table.schema.names.index("floats"), "floats", table["vector"]))


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    table = change(pq.read_table(path))
    rows = pq.ParquetFile(path).metadata.row_group(0).num_rows
    pq.write_table(table, path, row_group_size=rows)


@pytest.mark.parametrize(
    "damage",
    [
        cut_in_half,
        cut_tail,
        overwrite_start,
        overwrite_footer,
        make_empty,
        take_away,
        make_a_folder,
        exchange_for_another_part,
        drop_a_column,
        widen_a_column,
        swap_cells,
    ],
)
def test_a_file_that_was_changed_is_a_corrupt_dataset(copied: Any, damage: Callable[..., None]) -> None:
    paths = data_files(copied)
    damage(paths[0], [path for path in paths if path != paths[0]])
    with pytest.raises(CorruptDatasetError, match=r"run fit\(\) again"):
        joined(read_all(copied, TRAIN))


def test_values_that_were_changed_in_place_are_a_corrupt_dataset(write_dataset: Write) -> None:
    random = np.random.default_rng(0)
    block = random.random((500, 4)).astype("float32")
    written = write_dataset([ARRAY], [[batch(a=lists_of(block))]])
    path = data_files(written)[0]
    data = bytearray(path.read_bytes())
    # The last cell's last bytes: noise that the compression stores as it is.
    place = data.rindex(block[-1].tobytes())
    data[place : place + 4] = b"\x00\x00\x00\x00"
    path.write_bytes(data)
    with pytest.raises(CorruptDatasetError, match=r"run fit\(\) again"):
        joined(read_all(written, TRAIN))


def test_a_dataset_without_manifest_is_not_whole(copied: Any) -> None:
    copied.store.delete(copied.dataset, MANIFEST)
    with pytest.raises(CorruptDatasetError, match=r"there is no .*manifest\.json"):
        load_manifest(copied.store, copied.dataset)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": 99}', '{"version": 1, "columns": 3}'])
def test_a_damaged_manifest_is_a_corrupt_dataset(copied: Any, text: str) -> None:
    copied.store.publish_bytes(text.encode(), copied.dataset, MANIFEST)
    with pytest.raises(CorruptDatasetError, match=r"manifest"):
        load_manifest(copied.store, copied.dataset)


@pytest.mark.parametrize(
    "change",
    [
        {"path": "../../../etc/passwd"},
        {"path": "/etc/passwd"},
        {"path": "train/../../x.parquet"},
        {"path": "train/x\0.parquet"},
        {"path": ""},
        {"path": 7},
        {"index": -1},
        {"index": "0"},
        {"rows": 1.5},
    ],
    ids=str,
)
def test_a_manifest_names_row_groups_of_its_own_dataset_only(copied: Any, change: dict[str, Any]) -> None:
    text = json.loads(copied.store.read_bytes(copied.dataset, MANIFEST))
    text["splits"]["train"][0].update(change)
    copied.store.publish_bytes(json.dumps(text).encode(), copied.dataset, MANIFEST)
    with pytest.raises(CorruptDatasetError, match=r"manifest\.json is not a manifest"):
        load_manifest(copied.store, copied.dataset)


@pytest.mark.parametrize("damage", [cut_tail, make_empty, take_away, make_a_folder])
def test_a_file_that_is_missing_or_cut_is_found_without_opening_it(copied: Any, damage: Callable[..., None]) -> None:
    manifest = load_manifest(copied.store, copied.dataset)
    require_files(copied.store, copied.dataset, manifest)
    path = data_files(copied)[0]
    damage(path, [])
    with pytest.raises(CorruptDatasetError, match=re.escape(str(path))):
        require_files(copied.store, copied.dataset, manifest)


def test_a_manifest_of_another_version_is_refused() -> None:
    with pytest.raises(ValueError, match=r"manifest version 99, this hvdspark reads 1"):
        Manifest.from_json('{"version": 99, "columns": [], "splits": {}}')


@pytest.mark.parametrize("url", ["memory://materialize"])
def test_a_remote_store_holds_the_same_rows(arrow_frame: Callable[..., Any], url: str) -> None:
    store = Store.create(url)
    dataset, manifest = materialize(arrow_frame([[batch(x=[1, 2])], [batch(x=[3])]]), [X], Split(), store)
    plan = plan_shards(manifest.splits[TRAIN], 1, 2, keep_order=True)
    with ShardReader(store, dataset, manifest.columns, reads_of(plan, 0), workers=1) as reader:
        assert joined(iter(reader))["x"].ravel().tolist() == [1, 2, 3]
    store.delete(DATASETS)


def test_doubles_that_float32_cannot_hold_are_refused_and_infinities_are_kept(write_dataset: Write) -> None:
    narrowed = ColumnSpec("a", "scalar", "float32")
    kept = write_dataset([narrowed], [[batch(a=[1.0, math.inf, -math.inf])]])
    assert joined(read_all(kept, TRAIN))["a"].ravel().tolist() == [1.0, math.inf, -math.inf]
    with pytest.raises(
        ValueRangeError, match=r"'a' has the value 1e\+300, which float32 cannot hold.*scale the column"
    ):
        write_dataset([narrowed], [[batch(a=[1.0])], [batch(a=[1e300])]])


@pytest.mark.parametrize(
    ("column", "rows", "value", "nearest"),
    [
        (ColumnSpec("a", "scalar", "int64", fed_as=("float32",)), [1_700_000_001, 5], 1_700_000_001, 1_700_000_000),
        (ColumnSpec("a", "scalar", "int64", fed_as=("float64",)), [2**53 + 1, 5], 2**53 + 1, 2**53),
        (
            ColumnSpec("a", "array", "int64", None, fed_as=("float32",)),
            [[1, -(2**24) - 1], [2, 3]],
            -(2**24) - 1,
            -(2**24),
        ),
        (ColumnSpec("a", "array", "int64", 2, padding=2**24 + 1, fed_as=("float32",)), [[1], [2, 3]], 2**24 + 1, 2**24),
        (ColumnSpec("a", "scalar", "int64", fill=2**24 + 1, fed_as=("float32",)), [None, 5], 2**24 + 1, 2**24),
        (ColumnSpec("a", "scalar", "float32"), [2**24 + 1, 5], 2**24 + 1, 2**24),
    ],
    ids=["float32", "float64", "array", "padding", "fill", "weight"],
)
def test_whole_numbers_that_the_model_would_round_are_refused_while_they_are_written(
    write_dataset: Write, column: ColumnSpec, rows: list[Any], value: int, nearest: int
) -> None:
    write_dataset([column], [[batch(a=rows[1:])]])
    with pytest.raises(
        ValueRangeError,
        match=rf"'a' has the value {value}, which float.. cannot hold exactly \(the nearest is {nearest}\)",
    ) as caught:
        write_dataset([column], [[batch(a=rows[1:])], [batch(a=rows)]])
    assert caught.value.column == "a"


def test_a_dataset_written_for_one_model_is_checked_for_another(write_dataset: Write) -> None:
    written = write_dataset([ColumnSpec("a", "scalar", "int64")], [[batch(a=[1, 2**24 + 1])]])
    reads = reads_of(plan_shards(written.manifest.splits[TRAIN], 1, 2, keep_order=True), 0)
    columns = [dataclasses.replace(written.manifest.columns[0], fed_as=("float32",))]
    with (
        pytest.raises(ValueRangeError, match=r"'a' has the value 16777217"),
        ShardReader(written.store, written.dataset, columns, reads, verify=True) as reader,
    ):
        list(reader)


def test_what_a_column_is_fed_as_comes_back_from_the_manifest() -> None:
    manifest = Manifest((ColumnSpec("a", "scalar", "int64", fed_as=("float32", "int32")),), {TRAIN: ()})
    assert Manifest.from_json(manifest.to_json()) == manifest
