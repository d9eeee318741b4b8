"""Who reads which rows: exact, balanced, and in the order of one process where that is promised."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdspark.data.shards import filler_read, plan_shards, reads_of
from hvdspark.errors import EmptyDatasetError
from hvdspark.plan import RowGroup, ShardPlan

group_sizes = st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(sum)
ranks = st.integers(1, 9)
batches = st.integers(1, 40)


def groups_of(sizes: list[int]) -> list[RowGroup]:
    return [RowGroup(f"train/part-{index}.parquet", 0, rows) for index, rows in enumerate(sizes)]


def rows_of(plan: ShardPlan, rank: int) -> list[tuple[str, int]]:
    """List the rows that a rank reads, in order."""
    return [
        (read.group.path, row)
        for read in reads_of(plan, rank)
        for start, stop in read.pieces
        for row in range(start, stop)
    ]


@given(group_sizes, ranks, batches, st.booleans(), st.integers(0, 5))
def test_every_row_is_read_exactly_once(sizes: list[int], size: int, batch: int, keep: bool, seed: int) -> None:
    plan = plan_shards(groups_of(sizes), size, batch, keep_order=keep, seed=seed)
    found = Counter(row for rank in range(size) for row in rows_of(plan, rank))
    expected = {(group.path, row) for group in groups_of(sizes) for row in range(group.rows)}
    assert set(found) == expected
    assert set(found.values()) == {1}


@given(group_sizes, ranks, batches, st.booleans())
def test_shards_differ_by_at_most_one_row(sizes: list[int], size: int, batch: int, keep: bool) -> None:
    plan = plan_shards(groups_of(sizes), size, batch, keep_order=keep)
    counts = [len(rows_of(plan, rank)) for rank in range(size)]
    assert counts == [plan.rows_of(rank) for rank in range(size)]
    assert max(counts) - min(counts) <= 1
    assert sum(counts) == sum(sizes)


@given(group_sizes, ranks, batches)
def test_steps_hold_all_rows_and_none_is_empty_over_all_ranks(sizes: list[int], size: int, batch: int) -> None:
    plan = plan_shards(groups_of(sizes), size, batch, keep_order=False)
    per_step = [[plan.rows_at(rank, step) for rank in range(size)] for step in range(plan.steps)]
    assert [sum(step) for step in per_step] == [plan.total_rows_at(step) for step in range(plan.steps)]
    assert sum(map(sum, per_step)) == sum(sizes)
    assert all(0 < sum(step) <= size * batch for step in per_step)
    assert all(rows == batch for step in per_step[:-1] for rows in step)
    assert plan.has_idle_steps == (0 in per_step[-1])


@given(group_sizes, ranks, batches)
def test_ranks_in_kept_order_see_the_steps_of_one_process(sizes: list[int], size: int, batch: int) -> None:
    alone = plan_shards(groups_of(sizes), 1, batch * size, keep_order=True)
    together = plan_shards(groups_of(sizes), size, batch, keep_order=True)
    assert together.steps == alone.steps
    streams = [iter(rows_of(together, rank)) for rank in range(size)]
    stream = iter(rows_of(alone, 0))
    for step in range(alone.steps):
        expected = [next(stream) for _ in range(alone.rows_at(0, step))]
        found = [next(streams[rank]) for rank in range(size) for _ in range(together.rows_at(rank, step))]
        assert found == expected


def test_dealt_order_depends_on_the_seed_alone() -> None:
    groups = groups_of([5] * 20)
    first, again, other = (plan_shards(groups, 2, 4, keep_order=False, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.groups != other.groups
    assert sorted(first.groups, key=str) == sorted(other.groups, key=str)


def test_a_dealt_row_group_is_read_by_one_rank_unless_a_shard_ends_in_it() -> None:
    plan = plan_shards(groups_of([10] * 8), 2, 5, keep_order=False)
    read_by = Counter(read.group.path for rank in range(2) for read in reads_of(plan, rank))
    assert set(read_by.values()) == {1}


def test_one_row_for_two_ranks_leaves_one_rank_idle() -> None:
    plan = plan_shards(groups_of([1]), 2, 8, keep_order=False)
    assert (plan.steps, plan.has_idle_steps) == (1, True)
    assert [plan.rows_at(rank, 0) for rank in range(2)] == [1, 0]
    assert filler_read(plan, 0).rows == 1


def test_no_rows_are_refused() -> None:
    with pytest.raises(EmptyDatasetError, match="no rows"):
        plan_shards(groups_of([0, 0]), 2, 8, keep_order=True)


@given(st.lists(st.integers(0, 70), min_size=1, max_size=6).filter(any), batches)
def test_rows_that_lie_with_the_ranks_stay_there(shares: list[int], batch: int) -> None:
    groups = [RowGroup(f"train/part-{rank}.arrow", 0, rows) for rank, rows in enumerate(shares) if rows]
    plan = ShardPlan(tuple(groups), len(shares), batch, shares=tuple(shares))
    for rank, rows in enumerate(shares):
        assert rows_of(plan, rank) == [(f"train/part-{rank}.arrow", row) for row in range(rows)]
        own = [plan.rows_at(rank, step) for step in range(plan.steps)]
        assert sum(own) == rows == plan.rows_of(rank)
        # Full steps first, then what is left, then nothing.
        assert own == sorted(own, reverse=True)
        assert [step for step in range(plan.steps) if own[step]] == list(range(plan.own_steps(rank)))
    totals = [plan.total_rows_at(step) for step in range(plan.steps)]
    assert sum(totals) == sum(shares)
    assert min(totals) > 0
    assert plan.has_idle_steps == any(plan.rows_at(rank, plan.steps - 1) == 0 for rank in range(len(shares)))
