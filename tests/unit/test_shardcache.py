"""Where decoded rows are kept, and that nothing of them stays behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pytest
from column_kinds import encode

from hvdspark.data import shardcache
from hvdspark.data.blocks import Rows
from hvdspark.data.cells import TextBlock
from hvdspark.data.images import ImageBlock
from hvdspark.data.shardcache import CacheRoom, ShardCache, choose_place
from hvdspark.plan import CacheMode, GroupRead, RowGroup

READS = [GroupRead(RowGroup("train/a", index, 4), ((0, rows),)) for index, rows in enumerate((3, 4, 2))]


@pytest.mark.parametrize(
    ("mode", "needed", "memory", "disk", "expected"),
    [
        ("auto", 10, 10, 0, "memory"),
        ("auto", 11, 10, 11, "disk"),
        ("auto", 11, 10, 10, "none"),
        ("memory", 11, 10, 100, "memory"),
        ("disk", 10, 100, 10, "disk"),
        ("disk", 11, 100, 10, "none"),
        ("none", 1, 100, 100, "none"),
    ],
)
def test_rows_are_kept_where_there_is_room(mode: CacheMode, needed: int, memory: int, disk: int, expected: str) -> None:
    assert choose_place(mode, needed, memory, disk) == expected


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let there be 1000 bytes of memory and 4000 of disk."""
    monkeypatch.setattr(shardcache, "free_memory_bytes", lambda: 1000)
    monkeypatch.setattr(shardcache, "free_disk_bytes", lambda _folder: 4000)


@pytest.mark.usefixtures("small")
def test_half_of_what_is_free_is_shared_by_the_ranks_of_a_host(tmp_path: Path) -> None:
    assert CacheRoom(1, tmp_path).reserve("auto", 500, mappable=True) == "memory"
    assert CacheRoom(2, tmp_path).reserve("auto", 250, mappable=True) == "memory"
    assert CacheRoom(2, tmp_path).reserve("auto", 251, mappable=True) == "disk"
    assert CacheRoom(2, tmp_path).reserve("auto", 1001, mappable=True) == "none"


@pytest.mark.usefixtures("small")
def test_training_and_validation_rows_share_the_room_of_a_rank(tmp_path: Path) -> None:
    room = CacheRoom(1, tmp_path)
    assert [room.reserve("auto", 300, mappable=True) for _ in range(3)] == ["memory", "disk", "disk"]
    assert room.reserve("auto", 200, mappable=True) == "memory"
    assert room.reserve("auto", 1401, mappable=True) == "none"


@pytest.mark.usefixtures("small")
def test_rows_that_are_no_arrays_are_not_written_to_disk(tmp_path: Path) -> None:
    assert CacheRoom(1, tmp_path).reserve("auto", 501, mappable=False) == "none"
    assert CacheRoom(1, tmp_path).reserve("disk", 100, mappable=False) == "none"


def test_the_choice_is_logged_once_with_its_sizes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    fill(ShardCache(READS, "disk", CacheRoom(1, tmp_path)))
    [message] = [record.getMessage() for record in caplog.records]
    assert message.startswith("cache='disk': 0.0 MB of decoded rows are kept on disk (free for them: ")
    assert str(tmp_path) in message


class Words:
    """Rows of strings, as a block that is no array."""

    def __init__(self, words: list[str]) -> None:
        self.words = words

    @property
    def nbytes(self) -> int:
        return sum(map(len, self.words))

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, rows: Rows) -> Self:
        return type(self)(self.words[rows] if isinstance(rows, slice) else [self.words[row] for row in rows])

    def joined_to(self, others: Sequence[Self]) -> Self:
        return type(self)([*self.words, *[word for other in others for word in other.words]])


def blocks_of(index: int) -> dict[str, Any]:
    rows = READS[index].rows
    numbers = np.arange(rows) + 10 * index
    # With gaps between the rows, as blocks come from the files.
    wide = np.repeat(numbers[:, None], 5, axis=1).astype("f4")[:, 1:4]
    return {"x": numbers.reshape(-1, 1), "w": wide, "image": np.full((rows, 2, 3), index, "u1")}


def fill(cache: ShardCache, order: Sequence[int] = (1, 0, 2)) -> None:
    for index in order:
        assert not cache.is_whole
        kept = cache.put(index, blocks_of(index))
        assert {name: block.tolist() for name, block in kept.items()} == listed(index)


def listed(index: int) -> dict[str, Any]:
    return {name: block.tolist() for name, block in blocks_of(index).items()}


@pytest.mark.parametrize("mode", ["memory", "disk"])
def test_row_groups_come_back_as_they_were_put_in(tmp_path: Path, mode: CacheMode) -> None:
    cache = ShardCache(READS, mode, CacheRoom(1, tmp_path))
    fill(cache)
    assert cache.is_whole
    for index in range(len(READS)):
        found = cache.get(index)
        assert {name: block.tolist() for name, block in found.items()} == listed(index)
        assert {name: block.dtype for name, block in found.items()} == {"x": "i8", "w": "f4", "image": "u1"}


def test_rows_in_memory_are_one_array_per_column(tmp_path: Path) -> None:
    cache = ShardCache(READS, "memory", CacheRoom(1, tmp_path))
    fill(cache)
    joined = cache.joined([2, 0])
    assert joined is not None
    columns, rows = joined
    assert np.asarray(columns["x"])[rows].ravel().tolist() == [20, 21, 0, 1, 2]
    assert all(np.asarray(block).flags.c_contiguous for block in columns.values())


def test_blocks_that_are_no_arrays_are_kept_in_memory(tmp_path: Path) -> None:
    cache = ShardCache(READS, "auto", CacheRoom(1, tmp_path))
    words = [[f"{index}{row}" for row in range(read.rows)] for index, read in enumerate(READS)]
    for index in (2, 1, 0):
        cache.put(index, blocks_of(index) | {"word": Words(words[index])})
    assert cache.is_whole
    assert cache.joined([0]) is None
    for index in range(len(READS)):
        found: Any = cache.get(index)
        assert found["word"].words == words[index]
        assert found["x"].tolist() == listed(index)["x"]


def test_nothing_is_kept_where_there_is_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shardcache, "free_memory_bytes", lambda: 0)
    monkeypatch.setattr(shardcache, "free_disk_bytes", lambda _folder: 0)
    cache = ShardCache(READS, "auto", CacheRoom(1, tmp_path))
    fill(cache)
    assert not cache.is_whole


def test_rows_on_disk_have_no_file_that_could_stay_behind(tmp_path: Path) -> None:
    cache = ShardCache(READS, "disk", CacheRoom(1, tmp_path))
    fill(cache)
    assert list(tmp_path.iterdir()) == []
    assert mapped_under(tmp_path, os.getpid()) >= 3
    del cache
    assert mapped_under(tmp_path, os.getpid()) == 0


HOLDS_A_CACHE = """
import sys, pathlib
import numpy as np
from hvdspark.data.shardcache import CacheRoom, ShardCache
from hvdspark.plan import GroupRead, RowGroup
cache = ShardCache([GroupRead(RowGroup("a", 0, 1000), ((0, 1000),))], "disk", CacheRoom(1, pathlib.Path(sys.argv[1])))
cache.put(0, {"x": np.zeros((1000, 1000))})
print("filled", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("ending", [signal.SIGKILL, signal.SIGTERM, None])
def test_a_process_that_ends_in_any_way_leaves_nothing_on_disk(tmp_path: Path, ending: signal.Signals | None) -> None:
    command = [sys.executable, "-c", HOLDS_A_CACHE, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "filled\n"
        assert mapped_under(tmp_path, process.pid) == 1
        if ending is not None:
            process.send_signal(ending)
        process.communicate()
    assert process.returncode == (0 if ending is None else -ending)
    assert list(tmp_path.iterdir()) == []


def mapped_under(folder: Path, pid: int) -> int:
    """Count the mappings of files that are, or were, in a folder."""
    return sum(str(folder) in line for line in Path(f"/proc/{pid}/maps").read_text().splitlines())


@pytest.mark.parametrize(
    ("mode", "memory_bytes", "beside", "kept"),
    [
        ("auto", 20_000, "number", np.ndarray),
        ("memory", 20_000, "number", np.ndarray),
        ("auto", 10_000, "number", ImageBlock),
        ("memory", 10_000, "number", ImageBlock),
        ("memory", 10, "number", ImageBlock),
        ("auto", 20_000, "text", ImageBlock),
    ],
)
def test_images_are_kept_as_pixels_where_these_fit_into_memory_and_as_they_came_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: CacheMode, memory_bytes: int, beside: str, kept: type
) -> None:
    monkeypatch.setattr(shardcache, "free_memory_bytes", lambda: memory_bytes)
    pixels = np.full((9, 20, 15, 3), 7, "uint8")
    images = ImageBlock(pa.array([encode(picture, "PNG") for picture in pixels], pa.binary()), "png")
    numbers = np.arange(9).reshape(-1, 1)
    texts = TextBlock(pa.array([str(number) for number in range(9)]))
    cache = ShardCache(READS, mode, CacheRoom(1, tmp_path), threads=2)
    for index, rows in ((2, slice(7, 9)), (0, slice(0, 3)), (1, slice(3, 7))):
        found = cache.put(index, {"image": images[rows], "beside": (numbers if beside == "number" else texts)[rows]})
        image = found["image"]
        assert type(image) is kept
        np.testing.assert_array_equal(
            image if isinstance(image, np.ndarray) else image.to_dense(None, "c"), pixels[rows]
        )
    assert cache.is_whole
