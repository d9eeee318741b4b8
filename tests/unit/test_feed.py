"""Rows that go from the tasks to their ranks, without a dataset in between."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from hvdspark import Store
from hvdspark.data.feed import RowFeed, TakenRows
from hvdspark.data.partitions import Split
from hvdspark.data.planning import FitDraft
from hvdspark.data.reader import ShardReader
from hvdspark.data.shards import filler_read, reads_of
from hvdspark.errors import EmptyDatasetError, NullValueError, RaggedArrayError, ValueRangeError
from hvdspark.plan import BatchSpec, ColumnSpec, FitPlan, ShardPlan, StoreRef, TensorSpec

COLUMNS = (
    ColumnSpec("id", "scalar", "int64"),
    ColumnSpec("a", "array", "float32", size=None),
    ColumnSpec("s", "string", "string", storage="text"),
)


@pytest.fixture(autouse=True)
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARK_LOCAL_DIRS", str(tmp_path))
    return tmp_path


def draft(size: int, split: Split | None = None) -> FitDraft:
    batch = BatchSpec((TensorSpec(("a",)), TensorSpec(("s",), dtype="string")), (TensorSpec(("id",)),))
    return FitDraft("run", StoreRef("store"), COLUMNS, batch, split or Split(), size, 4, 4, 1, True, 0)


def batch(ids: Sequence[int], held: bool = False) -> pa.RecordBatch:
    """Make rows as Spark hands them over: columns by position."""
    arrays = pa.array([[float(i), i + 0.5] for i in ids], pa.list_(pa.float32()))
    texts = pa.array([f"row {i}" for i in ids])
    return pa.RecordBatch.from_arrays(
        [pa.array(ids, pa.int64()), arrays, texts, pa.array([held] * len(ids))], names=["c0", "c1", "c2", "c3"]
    )


@contextlib.contextmanager
def fed(partitions: Sequence[Sequence[pa.RecordBatch]], split: Split | None = None) -> Iterator[list[FitPlan]]:
    """Let each task take its partition; gives the plan of each."""
    feed = RowFeed(("id", "a", "s", "held"), draft(len(partitions), split))
    with contextlib.ExitStack() as stack:
        taken: list[TakenRows] = [stack.enter_context(feed.taken(iter(batches))) for batches in partitions]
        yield [rows.plan([other.report for other in taken]) for rows in taken]


def rows_of(plan: FitPlan, shards: ShardPlan, rank: int) -> list[int]:
    assert plan.data is not None
    found = []
    with ShardReader(Store.from_ref(plan.data), plan.dataset, plan.columns, reads_of(shards, rank)) as reader:
        for blocks in reader:
            ids = np.asarray(blocks["id"])[:, 0]
            np.testing.assert_array_equal(np.asarray(blocks["a"])[:, 1], ids + 0.5)
            assert blocks["s"][:].to_dense(None, "s")[:, 0].tolist() == [f"row {i}".encode() for i in ids]
            found += ids.tolist()
    return found


def test_each_rank_reads_its_own_partition_once_and_all_know_the_steps_of_all(scratch: Path) -> None:
    partitions = [[batch(range(5)), batch(range(5, 9))], [batch(range(9, 12))], [batch(range(12, 20)), batch([])]]
    with fed(partitions) as plans:
        assert [rows_of(plan, plan.train, rank) for rank, plan in enumerate(plans)] == [
            list(range(9)),
            list(range(9, 12)),
            list(range(12, 20)),
        ]
        assert {plan.train for plan in plans} == {plans[0].train}
        assert (plans[0].train.shares, plans[0].train.steps) == ((9, 3, 8), 3)
        assert plans[0].batch.features[0].shape == (2,)
        for rank, plan in enumerate(plans):
            (read,) = [filler_read(plan.train, rank)]
            assert read.group in [mine.group for mine in reads_of(plan.train, rank)]
    assert list(scratch.iterdir()) == []


def test_validation_rows_are_held_out_where_they_lie() -> None:
    partitions = [[batch(range(5)), batch([100], held=True)], [batch(range(5, 9))]]
    with fed(partitions, Split(column="held")) as plans:
        for rank, plan in enumerate(plans):
            assert plan.val is not None
            assert plan.val.shares == (1, 0)
            assert rows_of(plan, plan.train, rank) == [list(range(5)), list(range(5, 9))][rank]
        val = plans[0].val
        assert val is not None
        assert rows_of(plans[0], val, 0) == [100]


def test_what_is_wrong_in_one_partition_is_the_same_error_in_every_task() -> None:
    nulls = batch([7, 8]).set_column(0, "c0", pa.array([7, None], pa.int64()))
    ragged = batch([7]).set_column(1, "c1", pa.array([[1.0]], pa.list_(pa.float32())))
    for bad, error, message in (
        (nulls, NullValueError, "column 'id' has 1 nulls"),
        (ragged, RaggedArrayError, "column 'a'"),
    ):
        feed = RowFeed(("id", "a", "s", "held"), draft(2))
        with feed.taken(iter([batch([1])])) as first, feed.taken(iter([bad])) as second:
            for rows in (first, second):
                with pytest.raises(error, match=message):
                    rows.plan([first.report, second.report])


def test_a_rank_without_rows_is_refused_with_what_to_do() -> None:
    with (
        pytest.raises(EmptyDatasetError, match="rank 1 of 2 was given none of the 1 training rows"),
        fed([[batch([1])], []]),
    ):
        pass


def test_whole_numbers_that_the_model_would_round_are_refused_before_the_ranks_train(scratch: Path) -> None:
    columns = (dataclasses.replace(COLUMNS[0], fed_as=("float32",)), *COLUMNS[1:])
    feed = RowFeed(("id", "a", "s", "held"), dataclasses.replace(draft(2), columns=columns))
    with feed.taken(iter([batch([1, 2])])) as first, feed.taken(iter([batch([2**24 + 1])])) as second:
        for rows in (first, second):
            with pytest.raises(ValueRangeError, match=r"column 'id' has the value 16777217"):
                rows.plan([first.report, second.report])
    assert list(scratch.iterdir()) == []
