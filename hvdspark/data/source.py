"""The rows of a rank's shard, pass after pass, in an order that the seed decides.

The order of a pass depends on the seed, the number of the pass and the shard, and on nothing else: not on the machine,
the number of threads or the cache, so that a run that is resumed elsewhere sees the same order.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from hvdspark.data.blocks import Blocks, join, row_count, size_bytes, stack, take
from hvdspark.data.images import ImageBlock
from hvdspark.data.reader import ShardReader
from hvdspark.data.shardcache import CacheRoom, ShardCache
from hvdspark.plan import CacheMode, ColumnSpec, GroupRead
from hvdspark.store import Store

# Rows are shuffled within a window of this many bytes; a smaller shard is shuffled uniformly. One window is given out
# while the next is gathered and then joined: with those that are being read, up to three times as much is held.
SHUFFLE_WINDOW_BYTES = 128 << 20

_END: Any = object()

Item = TypeVar("Item")
# Columns, and the rows of them that come next; None stands for all of them as they are.
Window = tuple[Blocks, npt.NDArray[np.int64] | None]


class BlockSource:
    """The blocks of a shard, pass after pass, shuffled anew for each; encoded images come as pixels.

    A shuffled pass takes the row groups in random order and permutes the rows of as many of them as fill a window
    (``SHUFFLE_WINDOW_BYTES`` of rows as they are read, images encoded, but at least one row group). So a shard that
    fits into a window comes in a uniformly random order, and a larger one in as many uniformly shuffled parts as it has
    windows, each of row groups from all over it. The windows are the same whether rows come from files or from the
    cache.

    Parameters
    ----------
    store, dataset, columns, reads
        As for :class:`~hvdspark.data.reader.ShardReader`.
    shuffle
        Whether row groups and rows come in random order.
    seed
        Seed; the order of a pass depends on it and on the number of the pass alone.
    workers
        Threads that read and decode.
    stacks
        Columns that are put side by side, as :func:`~hvdspark.data.blocks.stack` does: one wide block is shuffled much
        faster than many narrow ones.
    cache
        Where decoded rows are kept during the first pass, for the later ones.
    room
        What the cache may take; by default as if this were the only rank of the host.
    """

    def __init__(
        self,
        store: Store,
        dataset: str,
        columns: Sequence[ColumnSpec],
        reads: Sequence[GroupRead],
        *,
        shuffle: bool,
        seed: int | Sequence[int] = 0,
        workers: int = 2,
        stacks: Mapping[str, Sequence[str]] | None = None,
        cache: CacheMode = "none",
        room: CacheRoom | None = None,
    ) -> None:
        self._open = (store, dataset, columns)
        self._reads = list(reads)
        self._shuffle = shuffle
        self._seed = [seed] if isinstance(seed, int) else list(seed)
        self._workers = workers
        self._stacks = dict(stacks or {})
        self._cache = ShardCache(self._reads, cache, room or CacheRoom(), workers)
        self._read_bytes = [0] * len(self._reads)
        self._verified = False

    def passes(self, numbers: Sequence[int], rows: int) -> Iterator[Iterator[Blocks]]:
        """Yield passes over the shard, each as its blocks; each must be exhausted before the next is asked for.

        What comes next is made ready in a thread meanwhile, the next pass too.

        Parameters
        ----------
        numbers
            The passes; the number of a pass decides its order.
        rows
            Rows of each block but the last of a pass, which may have fewer.
        """

        def windows() -> Generator[Window | None]:
            for number in numbers:
                yield from self._windows(number)
                yield None

        with closing(_ahead(windows())) as found:
            for _ in numbers:
                yield map(self._decoded, _cut(_to_mark(found), rows))

    def _decoded(self, blocks: Blocks) -> Blocks:
        """Decode images, now that there are only a few: in windows their pixels would take many times as much."""
        return {
            name: block.decoded(name, self._workers) if isinstance(block, ImageBlock) else block
            for name, block in blocks.items()
        }

    def _windows(self, number: int) -> Iterator[Window]:
        if not self._shuffle:
            yield from ((blocks, None) for _, blocks in self._read(range(len(self._reads))))
            return
        random = np.random.default_rng([*self._seed, number])
        order = [int(index) for index in random.permutation(len(self._reads))]
        for indices, items in self._filled(order):
            permuted = random.permutation(sum(self._reads[index].rows for index in indices))
            kept = self._cache.joined(indices)
            window = (join(items), permuted) if kept is None else (kept[0], kept[1][permuted])
            # While the window is given out, memory is for the next one.
            items.clear()
            yield window

    def _read(self, order: Sequence[int]) -> Iterator[tuple[int, Blocks]]:
        """Yield row groups by their number in the shard, from the cache once it has them all."""
        if self._cache.is_whole:
            yield from ((index, self._cache.get(index)) for index in order)
            return
        store, dataset, columns = self._open
        reads = [self._reads[index] for index in order]
        with ShardReader(store, dataset, columns, reads, self._workers, verify=not self._verified) as reader:
            for index, blocks in zip(order, reader, strict=True):
                self._read_bytes[index] = size_bytes(blocks)
                yield index, self._cache.put(index, stack(blocks, self._stacks))
        self._verified = True

    def _filled(self, order: Sequence[int]) -> Iterator[tuple[list[int], list[Blocks]]]:
        """Gather row groups, and their numbers, until they fill a window by what they took when they were read."""
        indices: list[int] = []
        items: list[Blocks] = []
        held_bytes = 0
        for index, blocks in self._read(order):
            indices.append(index)
            items.append(blocks)
            held_bytes += self._read_bytes[index]
            if held_bytes >= SHUFFLE_WINDOW_BYTES:
                yield indices, items
                indices, items, held_bytes = [], [], 0
        if indices:
            yield indices, items


def _to_mark(windows: Iterator[Window | None]) -> Iterator[Window]:
    """Yield the windows of one pass; fails, other than an iterator with a sentinel, where its end never comes."""
    while (window := next(windows)) is not None:
        yield window


def _cut(windows: Iterable[Window], rows: int) -> Iterator[Blocks]:
    """Cut windows into blocks of so many rows; what is left of one is joined to the next."""
    rest: list[Blocks] = []
    missing = rows
    for columns, order in windows:
        total = row_count(columns) if order is None else len(order)
        start = 0
        while start < total:
            stop = min(start + missing, total)
            chosen = slice(start, stop) if order is None else order[start:stop]
            rest.append({name: take(block, chosen) for name, block in columns.items()})
            missing -= stop - start
            start = stop
            if not missing:
                yield join(rest)
                rest, missing = [], rows
    if rest:
        yield join(rest)


def _ahead(items: Generator[Item]) -> Generator[Item]:
    """Yield items, with the next one being made in a thread; closing this closes the items' generator."""
    with ThreadPoolExecutor(1) as pool:
        try:
            coming = pool.submit(next, items, _END)
            while (item := coming.result()) is not _END:
                coming = pool.submit(next, items, _END)
                yield item
        finally:
            # In the same thread, so after whatever it is making.
            pool.submit(items.close).result()
