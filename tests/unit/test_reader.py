"""A rank's rows: in order, or shuffled as the seed says, and nothing left running."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdspark.data import reader as reading
from hvdspark.data.partitions import TRAIN
from hvdspark.data.reader import BlockSource, ShardReader, read_group
from hvdspark.data.shards import plan_shards, reads_of
from hvdspark.errors import CorruptDatasetError
from hvdspark.plan import ColumnSpec, GroupRead, RowGroup

Write = Callable[..., Any]

X = ColumnSpec("x", "scalar", "int64")
WIDE = ColumnSpec("w", "array", "float32", None)
ROWS = 120


@pytest.fixture(scope="module")
def written(write_dataset: Write) -> Any:
    """Write 120 numbered rows in 60 row groups of two files."""
    numbers = np.arange(ROWS)
    wide = [[float(number), number + 0.5] for number in numbers]
    batch = pa.RecordBatch.from_pydict({"x": numbers, "w": pa.array(wide, pa.list_(pa.float32()))})
    return write_dataset([X, WIDE], [[batch.slice(0, 60)], [batch.slice(60)]], group_bytes=2 * 16)


def source(written: Any, *, shuffle: bool, rank: int = 0, size: int = 1, **given: Any) -> BlockSource:
    plan = plan_shards(written.manifest.splits[TRAIN], size, 4, keep_order=given.pop("keep_order", True))
    columns = written.manifest.columns
    return BlockSource(written.store, written.dataset, columns, reads_of(plan, rank), shuffle=shuffle, **given)


def rows_of(blocks: Iterator[dict[str, Any]]) -> list[int]:
    """List the rows' numbers, having checked that the columns still belong together."""
    found: list[int] = []
    for item in blocks:
        assert item["w"].tolist() == [[x, x + 0.5] for x in item["x"].ravel().tolist()]
        found += item["x"].ravel().tolist()
    return found


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread is not threading.main_thread()]


def test_one_thread_reads_the_rows_in_the_order_of_the_data(written: Any) -> None:
    assert rows_of(source(written, shuffle=False, workers=1).passes(0)) == list(range(ROWS))


@pytest.mark.parametrize("workers", [2, 4])
def test_several_threads_read_the_rows_in_the_order_of_the_data(written: Any, workers: int) -> None:
    passes = source(written, shuffle=False, workers=workers)
    assert [rows_of(passes.passes(number)) for number in range(3)] == [list(range(ROWS))] * 3


def test_ranks_in_kept_order_read_the_pieces_of_each_step(written: Any) -> None:
    first, second = (
        rows_of(source(written, shuffle=False, workers=1, rank=rank, size=2).passes(0)) for rank in range(2)
    )
    steps = [first[start : start + 4] + second[start : start + 4] for start in range(0, 60, 4)]
    assert [row for step in steps for row in step] == list(range(ROWS))


@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1), st.integers(0, 3), st.integers(1, 3), st.integers(1, 3))
def test_every_pass_is_a_permutation(written: Any, seed: int, number: int, workers: int, size: int) -> None:
    shares = [source(written, shuffle=True, seed=seed, workers=workers, rank=rank, size=size) for rank in range(size)]
    found = Counter(row for share in shares for row in rows_of(share.passes(number)))
    assert found == Counter(range(ROWS))


def test_the_order_depends_on_the_seed_and_the_pass_alone(written: Any) -> None:
    def order(seed: Any, number: int) -> list[int]:
        return rows_of(source(written, shuffle=True, seed=seed, workers=1).passes(number))

    again = source(written, shuffle=True, seed=(5, 0), workers=1)
    rows_of(again.passes(0))
    assert rows_of(again.passes(1)) == order((5, 0), 1)
    orders = [order((5, 0), 0), order((5, 0), 1), order((6, 0), 0), order((5, 1), 0), list(range(ROWS))]
    assert len(set(map(tuple, orders))) == len(orders)


def test_the_order_does_not_depend_on_the_number_of_threads(written: Any) -> None:
    found = {
        tuple(rows_of(source(written, shuffle=True, seed=5, workers=workers).passes(0))) for workers in (1, 2, 3, 2, 3)
    }
    assert len(found) == 1


def test_the_cache_gives_the_same_rows_in_the_same_order_as_the_files(written: Any) -> None:
    for shuffle in (True, False):
        cached = source(written, shuffle=shuffle, seed=3, workers=1, cache_in_memory=True)
        plain = source(written, shuffle=shuffle, seed=3, workers=1)
        for number in range(3):
            assert rows_of(cached.passes(number)) == rows_of(plain.passes(number))


def test_the_cache_reads_the_files_once(written: Any) -> None:
    cached = source(written, shuffle=True, workers=1, cache_in_memory=True)
    rows_of(cached.passes(0))
    with mock.patch.object(reading, "read_group", side_effect=AssertionError("read again")):
        assert sorted(rows_of(cached.passes(1))) == list(range(ROWS))


def test_a_first_pass_that_was_cut_off_does_not_pass_for_a_whole_cache(written: Any) -> None:
    cached = source(written, shuffle=False, workers=1, cache_in_memory=True)
    begun = cached.passes(0)
    next(begun)
    begun.close()
    assert rows_of(cached.passes(1)) == list(range(ROWS))
    assert rows_of(cached.passes(2)) == list(range(ROWS))


def test_rows_are_shuffled_uniformly_where_the_shard_fits_the_window(written: Any) -> None:
    passes = source(written, shuffle=True, seed=1, workers=1, cache_in_memory=True)
    orders = np.array([rows_of(passes.passes(number)) for number in range(400)])
    places = np.argsort(orders, axis=1)
    # Row and place are independent: each of 400 means of a uniform place has a standard deviation of 1.73.
    assert np.abs(places.mean(axis=0) - (ROWS - 1) / 2).max() < 5 * 1.73
    # Neighbours in the data end up anywhere: 1 of 60 pairs of places is adjacent.
    adjacent = np.abs(places[:, 1:] - places[:, :-1]) == 1
    assert abs(adjacent.mean() - 2 / ROWS) < 0.002
    counts = np.histogram2d(np.tile(np.arange(ROWS), 400), places.ravel(), bins=6)[0]
    expected = 400 * ROWS / 36
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    # 25 degrees of freedom; 52.6 is exceeded by one in a thousand.
    assert chi_squared < 52.6


def test_a_shard_larger_than_the_window_is_still_read_whole_and_in_random_groups(
    written: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "SHUFFLE_WINDOW_BYTES", 10 * 16)
    found = rows_of(source(written, shuffle=True, seed=2, workers=1).passes(0))
    assert sorted(found) == list(range(ROWS))
    # Groups of all of the data, not of its beginning, are in the first window.
    assert max(found[:10]) > 60


def test_a_shard_reads_only_its_own_rows_of_a_row_group(written: Any) -> None:
    group = written.manifest.splits[TRAIN][3]
    assert group.rows == 2
    read = GroupRead(group, ((1, 2),))
    blocks = read_group(written.store, written.dataset, written.manifest.columns, read)
    assert {name: block.tolist() for name, block in blocks.items()} == {"x": [[7]], "w": [[7.0, 7.5]]}


def test_only_the_columns_asked_for_are_read(written: Any) -> None:
    read = GroupRead(written.manifest.splits[TRAIN][0], ((0, 2),))
    blocks = read_group(written.store, written.dataset, written.manifest.columns[1:], read)
    assert {name: block.tolist() for name, block in blocks.items()} == {"w": [[0.0, 0.5], [1.0, 1.5]]}


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("cache", [True, False])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_rank_without_rows_reads_nothing(written: Any, shuffle: bool, cache: bool, workers: int) -> None:
    idle = BlockSource(
        written.store,
        written.dataset,
        written.manifest.columns,
        [],
        shuffle=shuffle,
        workers=workers,
        cache_in_memory=cache,
    )
    before = reader_threads()
    assert [list(idle.passes(number)) for number in range(3)] == [[], [], []]
    assert reader_threads() == before


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("taken", [0, 1, 30])
def test_a_pass_that_is_closed_early_leaves_no_thread(
    written: Any, monkeypatch: pytest.MonkeyPatch, shuffle: bool, taken: int
) -> None:
    monkeypatch.setattr(reading, "SHUFFLE_WINDOW_BYTES", 64)
    before = reader_threads()
    begun = source(written, shuffle=shuffle).passes(0)
    for _ in range(taken):
        next(begun)
    begun.close()
    assert reader_threads() == before


def test_a_pass_that_ends_leaves_no_thread(written: Any) -> None:
    before = reader_threads()
    assert len(rows_of(source(written, shuffle=True).passes(0))) == ROWS
    assert reader_threads() == before


def test_a_row_group_that_is_missing_ends_the_pass_with_its_error_and_no_thread(
    written: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = written.manifest.columns
    reads = [
        GroupRead(written.manifest.splits[TRAIN][0], ((0, 2),)),
        GroupRead(RowGroup("train/gone", 0, 2), ((0, 2),)),
    ]
    before = reader_threads()
    with pytest.raises(CorruptDatasetError, match=r"train/gone cannot be read"):
        list(BlockSource(written.store, written.dataset, columns, reads, shuffle=False).passes(0))
    assert reader_threads() == before


def test_a_row_group_of_another_length_than_the_manifest_says_is_refused(written: Any) -> None:
    group = written.manifest.splits[TRAIN][0]
    longer = RowGroup(group.path, group.index, group.rows + 1)
    with pytest.raises(CorruptDatasetError, match=r"has 2 rows, but the manifest says 3"):
        read_group(written.store, written.dataset, written.manifest.columns, GroupRead(longer, ((0, 3),)))


def test_a_row_group_that_the_file_does_not_have_is_refused(written: Any) -> None:
    group = written.manifest.splits[TRAIN][0]
    beyond = RowGroup(group.path, 99, 2)
    with pytest.raises(CorruptDatasetError, match=r"row group 99 of .* cannot be read"):
        read_group(written.store, written.dataset, written.manifest.columns, GroupRead(beyond, ((0, 2),)))


def test_a_reader_prints_nothing(written: Any, capfd: pytest.CaptureFixture[str]) -> None:
    plan = plan_shards(written.manifest.splits[TRAIN], 1, 4, keep_order=True)
    with ShardReader(written.store, written.dataset, written.manifest.columns, reads_of(plan, 0)) as reader:
        next(reader)
    assert capfd.readouterr() == ("", "")
