"""A rank's rows, pass after pass: in order, or shuffled as the seed says, and nothing left running."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from column_kinds import encode
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdspark.data import reader as reading
from hvdspark.data import shardcache
from hvdspark.data import source as sourcing
from hvdspark.data.images import ImageBlock
from hvdspark.data.partitions import TRAIN
from hvdspark.data.shards import plan_shards, reads_of
from hvdspark.data.source import BlockSource
from hvdspark.errors import CorruptDatasetError, ImageError
from hvdspark.plan import CacheMode, ColumnSpec, GroupRead, RowGroup

Write = Callable[..., Any]

X = ColumnSpec("x", "scalar", "int64")
WIDE = ColumnSpec("w", "array", "float32", None)
ROWS = 120
ROW_BYTES = 16

CACHES: tuple[CacheMode, ...] = get_args(CacheMode)
SMALL_WINDOW = 20 * ROW_BYTES


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


def rows_of(blocks: Iterable[dict[str, Any]]) -> list[int]:
    """List the rows' numbers, having checked that the columns still belong together."""
    found: list[int] = []
    for item in blocks:
        assert item["w"].tolist() == [[x, x + 0.5] for x in item["x"].ravel().tolist()]
        found += item["x"].ravel().tolist()
    return found


def orders_of(found: BlockSource, numbers: Sequence[int], rows: int = 7) -> list[list[int]]:
    """List the rows of some passes, having checked that blocks have the length that was asked for."""
    orders = []
    for blocks in found.passes(numbers, rows):
        items = list(blocks)
        assert all(len(item["x"]) == rows for item in items[:-1])
        assert not items or 0 < len(items[-1]["x"]) <= rows
        orders.append(rows_of(items))
    assert len(orders) == len(numbers)
    return orders


def order_of(found: BlockSource, number: int) -> list[int]:
    [order] = orders_of(found, [number])
    return order


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread is not threading.main_thread()]


def test_one_thread_reads_the_rows_in_the_order_of_the_data(written: Any) -> None:
    assert order_of(source(written, shuffle=False, workers=1), 0) == list(range(ROWS))


@pytest.mark.parametrize("workers", [2, 4])
def test_several_threads_read_the_rows_in_the_order_of_the_data(written: Any, workers: int) -> None:
    passes = source(written, shuffle=False, workers=workers)
    assert orders_of(passes, range(3)) == [list(range(ROWS))] * 3


def test_ranks_in_kept_order_read_the_pieces_of_each_step(written: Any) -> None:
    first, second = (order_of(source(written, shuffle=False, workers=1, rank=rank, size=2), 0) for rank in range(2))
    steps = [first[start : start + 4] + second[start : start + 4] for start in range(0, 60, 4)]
    assert [row for step in steps for row in step] == list(range(ROWS))


@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1), st.integers(0, 3), st.integers(1, 3), st.integers(1, 3))
def test_every_pass_is_a_permutation(written: Any, seed: int, number: int, workers: int, size: int) -> None:
    shares = [source(written, shuffle=True, seed=seed, workers=workers, rank=rank, size=size) for rank in range(size)]
    found = Counter(row for share in shares for row in order_of(share, number))
    assert found == Counter(range(ROWS))


def test_the_order_depends_on_the_seed_and_the_pass_alone(written: Any) -> None:
    def order(seed: Any, number: int) -> list[int]:
        return order_of(source(written, shuffle=True, seed=seed, workers=1), number)

    again = source(written, shuffle=True, seed=(5, 0), workers=1)
    assert orders_of(again, [0, 1]) == [order((5, 0), 0), order((5, 0), 1)]
    orders = [order((5, 0), 0), order((5, 0), 1), order((6, 0), 0), order((5, 1), 0), list(range(ROWS))]
    assert len(set(map(tuple, orders))) == len(orders)


def test_the_order_does_not_depend_on_the_number_of_threads(written: Any) -> None:
    found = {tuple(order_of(source(written, shuffle=True, seed=5, workers=workers), 0)) for workers in (1, 2, 3, 2, 3)}
    assert len(found) == 1


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("window_bytes", [SMALL_WINDOW, 1 << 20])
def test_every_cache_gives_the_rows_of_every_pass_in_the_order_that_the_files_give(
    written: Any, monkeypatch: pytest.MonkeyPatch, cache: CacheMode, shuffle: bool, window_bytes: int
) -> None:
    monkeypatch.setattr(sourcing, "SHUFFLE_WINDOW_BYTES", window_bytes)
    plain = [order_of(source(written, shuffle=shuffle, seed=3), number) for number in range(3)]
    found = orders_of(source(written, shuffle=shuffle, seed=3, cache=cache), range(3))
    assert found == plain
    assert [sorted(order) for order in found] == [list(range(ROWS))] * 3


@pytest.mark.parametrize("cache", CACHES)
def test_a_pass_has_the_same_order_after_a_start_in_the_middle(written: Any, cache: CacheMode) -> None:
    whole = orders_of(source(written, shuffle=True, seed=3, cache=cache), range(4))
    resumed = orders_of(source(written, shuffle=True, seed=3, cache=cache), [2, 3])
    assert resumed == whole[2:]


@pytest.mark.parametrize("cache", ["memory", "disk", "auto"])
def test_a_cache_reads_the_files_once(written: Any, cache: CacheMode) -> None:
    cached = source(written, shuffle=True, cache=cache)
    order_of(cached, 0)
    with mock.patch.object(reading, "read_group", side_effect=AssertionError("read again")):
        assert sorted(order_of(cached, 1)) == list(range(ROWS))


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_a_first_pass_that_was_cut_off_does_not_pass_for_a_whole_cache(
    written: Any, monkeypatch: pytest.MonkeyPatch, cache: CacheMode
) -> None:
    monkeypatch.setattr(sourcing, "SHUFFLE_WINDOW_BYTES", SMALL_WINDOW)
    cached = source(written, shuffle=False, cache=cache)
    begun = cached.passes([0], 7)
    next(next(begun))
    begun.close()
    assert orders_of(cached, [1, 2]) == [list(range(ROWS))] * 2


@pytest.mark.parametrize("rows", [1, 4, 119, 120, 121])
def test_blocks_have_the_rows_that_are_asked_for_across_windows(
    written: Any, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(sourcing, "SHUFFLE_WINDOW_BYTES", SMALL_WINDOW)
    for order in orders_of(source(written, shuffle=True), range(2), rows):
        assert sorted(order) == list(range(ROWS))


def test_columns_that_are_put_side_by_side_keep_their_rows(write_dataset: Write) -> None:
    numbers = np.arange(1000, dtype="f4")
    batch = pa.RecordBatch.from_pydict({"a": numbers, "b": numbers + 0.5, "c": numbers + 0.25})
    columns = [ColumnSpec(name, "scalar", "float32") for name in "abc"]
    found = write_dataset(columns, [[batch]], group_bytes=1200)
    stacked = source(found, shuffle=True, stacks={"ca": ("c", "a")})
    with mock.patch("hvdspark.data.blocks.STACK_BYTES", 64):
        [blocks] = [list(one) for one in stacked.passes([0], 300)]
    assert [set(item) for item in blocks] == [{"b", "ca"}] * 4
    wide = np.concatenate([item["ca"] for item in blocks])
    assert sorted(wide[:, 1]) == numbers.tolist()
    assert (wide[:, 0] == wide[:, 1] + 0.25).all()
    assert (np.concatenate([item["b"] for item in blocks])[:, 0] == wide[:, 1] + 0.5).all()


PASSES = 400
BINS = 6
# 25 degrees of freedom; one uniform order in a thousand exceeds it.
CHI_SQUARED_BOUND = 52.6


def places_of(written: Any) -> npt.NDArray[np.int64]:
    """Return the place of every row in each of many passes."""
    passes = source(written, shuffle=True, seed=1, workers=1, cache="memory")
    return np.argsort(np.array(orders_of(passes, range(PASSES), ROWS)), axis=1)


def chi_squared_of(places: npt.NDArray[np.int64]) -> float:
    """Compare how often rows of one sixth of the data are in each sixth of a pass with a uniform permutation."""
    counts = np.histogram2d(np.tile(np.arange(ROWS), len(places)), places.ravel(), bins=BINS)[0]
    expected = len(places) * ROWS / BINS**2
    return float(((counts - expected) ** 2 / expected).sum())


def adjacent_share_of(places: npt.NDArray[np.int64]) -> float:
    """Return how often two neighbours in the data are neighbours in a pass."""
    return float((np.abs(places[:, 1:] - places[:, :-1]) == 1).mean())


def test_rows_are_shuffled_uniformly_where_the_shard_fits_the_window(written: Any) -> None:
    places = places_of(written)
    # Row and place are independent: each of 400 means of a uniform place has a standard deviation of 1.73.
    assert np.abs(places.mean(axis=0) - (ROWS - 1) / 2).max() < 5 * 1.73
    # A row moves by a third of the data, on average; the mean of 400 passes strays by 0.11.
    moved = np.abs(places - np.arange(ROWS)).mean()
    assert abs(moved - (ROWS**2 - 1) / (3 * ROWS)) < 5 * 0.11
    # Neighbours in the data end up anywhere: 1 of 60 pairs of places is adjacent.
    assert abs(adjacent_share_of(places) - 2 / ROWS) < 0.002
    assert chi_squared_of(places) < CHI_SQUARED_BOUND
    # A pass tells nothing of the next one.
    between = [np.corrcoef(places[number], places[number + 1])[0, 1] for number in range(PASSES - 1)]
    assert abs(np.mean(between)) < 5 / np.sqrt(ROWS * PASSES)


def test_the_places_in_windows_are_uniform_and_only_rows_of_one_group_stay_near(
    written: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sourcing, "SHUFFLE_WINDOW_BYTES", SMALL_WINDOW)
    places = places_of(written)
    assert np.abs(places.mean(axis=0) - (ROWS - 1) / 2).max() < 5 * 1.73
    # Rows of one group come and go together, which makes the sums of squares vary by their number, two, more.
    assert chi_squared_of(places) < 2 * CHI_SQUARED_BOUND
    window = SMALL_WINDOW // ROW_BYTES
    same_group, neighbours = places[:, 0::2] // window == places[:, 1::2] // window, places[:, 1:-1:2] // window
    assert same_group.all()
    assert abs((neighbours == places[:, 2::2] // window).mean() - (window - 2) / (ROWS - 2)) < 0.02


@pytest.mark.parametrize("half", ["rows", "groups"])
def test_half_a_shuffle_would_be_noticed(written: Any, monkeypatch: pytest.MonkeyPatch, half: str) -> None:
    if half == "groups":
        monkeypatch.setattr(sourcing, "SHUFFLE_WINDOW_BYTES", 1)
        assert adjacent_share_of(places_of(written)) > 0.4
    else:
        orders = np.random.default_rng(0).permuted(np.tile(np.arange(20), (PASSES * 6, 1)), axis=1)
        places = (orders.reshape(PASSES, 6, 20) + 20 * np.arange(6)[:, None]).reshape(PASSES, ROWS)
        assert chi_squared_of(places) > 100 * CHI_SQUARED_BOUND


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_rank_without_rows_reads_nothing(written: Any, shuffle: bool, cache: CacheMode, workers: int) -> None:
    idle = BlockSource(
        written.store, written.dataset, written.manifest.columns, [], shuffle=shuffle, workers=workers, cache=cache
    )
    before = reader_threads()
    assert orders_of(idle, range(3)) == [[], [], []]
    assert reader_threads() == before


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("taken", [0, 1, 17])
def test_passes_that_are_closed_early_leave_no_thread(
    written: Any, monkeypatch: pytest.MonkeyPatch, shuffle: bool, taken: int
) -> None:
    monkeypatch.setattr(sourcing, "SHUFFLE_WINDOW_BYTES", 64)
    before = reader_threads()
    begun = source(written, shuffle=shuffle).passes(range(3), 7)
    blocks = next(begun)
    for _ in range(taken):
        next(blocks)
    begun.close()
    assert reader_threads() == before


def test_a_pass_that_goes_on_after_the_passes_were_closed_is_no_shorter_pass(written: Any) -> None:
    begun = source(written, shuffle=True).passes([0], 7)
    blocks = next(begun)
    begun.close()
    with pytest.raises(RuntimeError):
        list(blocks)


def test_passes_that_end_leave_no_thread(written: Any) -> None:
    before = reader_threads()
    orders_of(source(written, shuffle=True), range(2))
    assert reader_threads() == before


def test_a_row_group_that_is_missing_ends_the_pass_with_its_error_and_no_thread(written: Any) -> None:
    columns = written.manifest.columns
    reads = [
        GroupRead(written.manifest.splits[TRAIN][0], ((0, 2),)),
        GroupRead(RowGroup("train/gone", 0, 2), ((0, 2),)),
    ]
    before = reader_threads()
    broken = BlockSource(written.store, written.dataset, columns, reads, shuffle=False)
    with pytest.raises(CorruptDatasetError, match=r"train/gone cannot be read"):
        orders_of(broken, [0])
    assert reader_threads() == before


def test_a_byte_that_changed_on_disk_is_found_in_the_first_pass(write_dataset: Write) -> None:
    values = np.random.default_rng(0).integers(0, 256, (20, 3000), dtype=np.uint8)
    lists = pa.ListArray.from_arrays(np.arange(21, dtype=np.int32) * 3000, pa.array(values.ravel()))
    found = write_dataset([ColumnSpec("v", "array", "uint8", None)], [[pa.RecordBatch.from_pydict({"v": lists})]])
    path = found.store.path(found.dataset, found.manifest.splits[TRAIN][0].path)
    data = bytearray(Path(path).read_bytes())
    data[data.index(values[10].tobytes()) + 1500] ^= 1
    Path(path).write_bytes(data)

    with pytest.raises(CorruptDatasetError, match="cannot be read"):
        order_of(source(found, shuffle=True), 0)


PICTURES = ColumnSpec("p", "binary", "uint8", None)


def pixels_of(number: int) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(number).integers(0, 256, (5, 4, 3), dtype="uint8")


@pytest.fixture(scope="module")
def pictures(write_dataset: Write) -> Any:
    """Write 60 numbered images in 30 row groups of about 400 bytes."""
    cells = pa.array([encode(pixels_of(number), "PNG") for number in range(60)], pa.binary())
    batch = pa.RecordBatch.from_pydict({"x": np.arange(60), "p": cells})
    return write_dataset([X, PICTURES], [[batch]], group_bytes=2 * (len(cells[0].as_py()) + 8))


def numbers_of(blocks: Iterable[dict[str, Any]]) -> list[int]:
    """List the rows' numbers, having checked that each comes with its own pixels."""
    found: list[int] = []
    for item in blocks:
        for number, pixels in zip(item["x"].ravel().tolist(), item["p"], strict=True):
            np.testing.assert_array_equal(pixels, pixels_of(number))
            found.append(number)
    return found


@pytest.mark.parametrize("window", [2000, 1 << 20])
@pytest.mark.parametrize("shuffle", [True, False])
def test_images_come_as_pixels_in_the_same_order_whatever_the_threads_and_the_cache(
    pictures: Any, monkeypatch: pytest.MonkeyPatch, shuffle: bool, window: int
) -> None:
    monkeypatch.setattr(sourcing, "SHUFFLE_WINDOW_BYTES", window)
    orders = {}
    for cache in CACHES:
        for workers in (1, 3):
            found = source(pictures, shuffle=shuffle, cache=cache, workers=workers)
            orders[cache, workers] = [numbers_of(blocks) for blocks in found.passes(range(3), 7)]
    [first, *others] = orders.values()
    assert all(sorted(order) == list(range(60)) for order in first)
    assert all(other == first for other in others)
    assert (first[0] == first[1]) is not shuffle


@pytest.mark.parametrize(
    ("cache", "memory_bytes", "decoded"),
    [("auto", 1 << 30, 60), ("memory", 1 << 30, 60), ("auto", 2 * 60 * 60, 180), ("none", 1 << 30, 180)],
)
def test_images_are_decoded_once_where_their_pixels_fit_into_memory(
    pictures: Any, monkeypatch: pytest.MonkeyPatch, cache: CacheMode, memory_bytes: int, decoded: int
) -> None:
    monkeypatch.setattr(shardcache, "free_memory_bytes", lambda: memory_bytes)
    counts: list[int] = []
    decode = ImageBlock._decode

    def counted(self: ImageBlock, rows: Any, pixels: Any, column: str) -> None:
        counts.append(len(rows))
        decode(self, rows, pixels, column)

    monkeypatch.setattr(ImageBlock, "_decode", counted)
    for blocks in source(pictures, shuffle=True, cache=cache).passes(range(3), 7):
        assert sorted(numbers_of(blocks)) == list(range(60))
    # One more tells their shape.
    assert sum(counts) in (decoded, decoded + 1)


@pytest.mark.parametrize("cache", ["memory", "none"])
def test_an_image_that_cannot_be_decoded_is_named_by_its_column_whichever_thread_meets_it(
    write_dataset: Write, cache: CacheMode
) -> None:
    cells = [encode(pixels_of(number), "PNG") for number in range(40)]
    cells[33] = cells[33][:60]
    batch = pa.RecordBatch.from_pydict({"x": np.arange(40), "p": pa.array(cells, pa.binary())})
    found = source(write_dataset([X, PICTURES], [[batch]]), shuffle=True, cache=cache, workers=3)
    with pytest.raises(ImageError, match="column 'p' has a PNG image that cannot be decoded"):
        list(map(list, found.passes([0], 40)))
