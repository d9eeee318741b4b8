"""Keeps a rank's decoded rows, in memory or on a local disk, so that later passes need not read the files again."""

from __future__ import annotations

import itertools
import logging
import math
import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hvdspark.data.blocks import AnyBlock, Block, Blocks, row_count, size_bytes
from hvdspark.data.capacity import free_disk_bytes, free_memory_bytes, scratch_folder
from hvdspark.data.images import ImageBlock
from hvdspark.plan import CacheMode, GroupRead

logger = logging.getLogger(__name__)

Place = Literal["memory", "disk", "none"]

# Of the memory, and of the disk, that is free when training begins, the part that the caches of all ranks of a host may
# take together. The rest is for the model, its activations, and for whoever else is on the host.
MEMORY_SHARE = 0.5
DISK_SHARE = 0.5


def choose_place(mode: CacheMode, needed_bytes: int, memory_bytes: int, disk_bytes: int) -> Place:
    """Decide where decoded rows are kept.

    Parameters
    ----------
    mode
        What the user wants. ``"auto"``: memory where it suffices, else disk where that does, else nowhere. The user's
        ``"memory"`` is taken at its word; a ``"disk"`` that is too small is not filled.
    needed_bytes
        Size of the decoded rows.
    memory_bytes, disk_bytes
        What they may take there.
    """
    if mode == "memory" or (mode == "auto" and needed_bytes <= memory_bytes):
        return "memory"
    if mode in ("auto", "disk") and needed_bytes <= disk_bytes:
        return "disk"
    return "none"


class CacheRoom:
    """What the caches of one rank may take, its training and its validation rows together.

    Parameters
    ----------
    local_size
        Ranks on this host, which share its memory and disk.
    folder
        Where files go; by default :func:`~hvdspark.data.capacity.scratch_folder`.
    """

    def __init__(self, local_size: int = 1, folder: Path | None = None) -> None:
        self._local_size = local_size
        self.folder = folder
        self._left: dict[Place, int] | None = None

    def reserve(self, mode: CacheMode, needed_bytes: int, *, mappable: bool) -> Place:
        """Decide by :func:`choose_place` where rows are kept, and set the room aside.

        Parameters
        ----------
        mode, needed_bytes
            As there.
        mappable
            Whether the rows can be in a file at all: they are numbers, and so many for each row.
        """
        left = self._measure()
        place = choose_place(mode, needed_bytes, left["memory"], left["disk"] if mappable else 0)
        logger.info(
            "cache=%r: %.1f MB of decoded rows are kept %s (free for them: %.1f MB of memory, %.1f MB of disk in %s)",
            mode,
            needed_bytes / 1e6,
            {"memory": "in memory", "disk": "on disk", "none": "nowhere, and read again in every epoch"}[place],
            left["memory"] / 1e6,
            left["disk"] / 1e6,
            self.folder,
        )
        left[place] -= needed_bytes
        return place

    def has_memory(self, needed_bytes: int) -> bool:
        """Tell whether so much may still be taken of the memory."""
        return needed_bytes <= self._measure()["memory"]

    def _measure(self) -> dict[Place, int]:
        """Measure what is free; when the first rows come, because by then the model is in memory."""
        if self._left is None:
            self.folder = self.folder or scratch_folder()
            self._left = {
                "memory": int(free_memory_bytes() * MEMORY_SHARE / self._local_size),
                "disk": int(free_disk_bytes(self.folder) * DISK_SHARE / self._local_size),
                "none": 0,
            }
        return self._left


class ShardCache:
    """The decoded rows of a shard, column by column in one piece, in the order of the shard.

    A cache is empty until the first :meth:`put`, which decides where it is, and whole once all row groups are in it.
    Encoded images are kept as pixels where these fit into memory, else as they came.

    Parameters
    ----------
    reads
        The shard's row groups.
    mode
        Where to keep the rows.
    room
        What may be taken.
    threads
        Threads that decode images.
    """

    def __init__(self, reads: Sequence[GroupRead], mode: CacheMode, room: CacheRoom, threads: int = 1) -> None:
        self._offsets = [0, *itertools.accumulate(read.rows for read in reads)]
        self._mode = mode
        self._room = room
        self._threads = threads
        self._place: Place | None = None if mode != "none" else "none"
        self._columns: dict[str, _Array | _Pieces] = {}
        self._held: set[int] = set()

    @property
    def is_whole(self) -> bool:
        """Whether every row group is there."""
        return self._place != "none" and len(self._held) == len(self._offsets) - 1

    def put(self, index: int, blocks: Blocks) -> Blocks:
        """Keep a row group's rows, if they are to be kept.

        Returns
        -------
        dict of str to Block
            The same rows, from the cache where it has them, so that the originals can go.
        """
        if self._place is None:
            self._place = self._begin(blocks)
        if self._place == "none":
            return blocks
        start, stop = self._offsets[index : index + 2]
        for name, column in self._columns.items():
            column.put(start, stop, blocks[name])
        self._held.add(index)
        return self.get(index)

    def get(self, index: int) -> Blocks:
        """Return the rows of a row group that was put in."""
        start, stop = self._offsets[index : index + 2]
        return {name: column.get(start, stop) for name, column in self._columns.items()}

    def joined(self, indices: Sequence[int]) -> tuple[Blocks, npt.NDArray[np.int64]] | None:
        """Return columns, and which of their rows are those of some row groups, in this order.

        ``None`` where the columns are not in memory in one piece: from disk, row groups are best fetched one by one,
        each in one sweep.
        """
        columns: Blocks = {name: column.values for name, column in self._columns.items() if isinstance(column, _Array)}
        if self._place != "memory" or len(columns) < len(self._columns):
            return None
        rows = np.concatenate([np.arange(*self._offsets[index : index + 2]) for index in indices])
        return columns, rows

    def _begin(self, blocks: Blocks) -> Place:
        """Choose the place by the first row group that comes, and make the columns."""
        total = self._offsets[-1]
        needed_bytes = size_bytes(blocks) * total // row_count(blocks)
        pixel_bytes = _decoded_bytes(blocks) * total // row_count(blocks)
        mappable = all(isinstance(block, np.ndarray) for block in blocks.values())
        # Not beside text or sparse vectors: such rows are joined anew for every window, too large a one for pixels.
        decodes = all(isinstance(block, np.ndarray | ImageBlock) for block in blocks.values())
        decodes &= not mappable and self._mode in ("auto", "memory") and self._room.has_memory(pixel_bytes)
        place = self._room.reserve(self._mode, pixel_bytes if decodes else needed_bytes, mappable=mappable)
        if place == "none":
            return place
        for name, block in blocks.items():
            if isinstance(block, ImageBlock) and decodes:
                self._columns[name] = _Pixels(name, total, block, self._threads)
            elif not isinstance(block, np.ndarray):
                self._columns[name] = _Pieces()
            elif place == "memory":
                self._columns[name] = _Array(np.empty((total, *block.shape[1:]), block.dtype))
            else:
                assert self._room.folder is not None
                self._columns[name] = _File((total, *block.shape[1:]), block.dtype, self._room.folder)
        return place


class _Array:
    """A column in one array."""

    def __init__(self, values: Block) -> None:
        self.values = values

    def put(self, start: int, stop: int, block: AnyBlock) -> None:
        self.values[start:stop] = block

    def get(self, start: int, stop: int) -> Block:
        return self.values[start:stop]


def _decoded_bytes(blocks: Blocks) -> int:
    """Count the bytes that columns take once their images are pixels."""
    return sum(
        block.dense_row_bytes * len(block) if isinstance(block, ImageBlock) else block.nbytes
        for block in blocks.values()
    )


class _Pixels(_Array):
    """A column of encoded images, decoded in one array."""

    def __init__(self, name: str, total: int, first: ImageBlock, threads: int) -> None:
        super().__init__(np.empty((total, *first[:1].decoded(name).shape[1:]), np.uint8))
        self._name = name
        self._threads = threads

    def put(self, start: int, stop: int, block: AnyBlock) -> None:
        assert isinstance(block, ImageBlock)
        block.decoded(self._name, self._threads, self.values[start:stop])


class _File(_Array):
    """A column in an array that is a file without a name, so that nothing is left of it however the process ends."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], folder: Path) -> None:
        length = math.prod(shape) * dtype.itemsize
        with tempfile.TemporaryFile(dir=folder) as file:
            # A full disk is an error here; later it would be a SIGBUS.
            os.posix_fallocate(file.fileno(), 0, length)
            self._map = mmap.mmap(file.fileno(), length)
        super().__init__(np.frombuffer(self._map, dtype).reshape(shape))

    def get(self, start: int, stop: int) -> Block:
        # The pages of earlier row groups leave this process (not the page cache), so that it stays as small as without.
        self._map.madvise(mmap.MADV_DONTNEED)
        return super().get(start, stop)


class _Pieces:
    """A column of blocks that are no arrays, each as it came."""

    def __init__(self) -> None:
        self._blocks: dict[int, AnyBlock] = {}

    def put(self, start: int, _stop: int, block: AnyBlock) -> None:
        self._blocks[start] = block

    def get(self, start: int, _stop: int) -> AnyBlock:
        return self._blocks[start]
