"""Pure arithmetic: which rank reads which rows of which row group.

Petastorm shards by ``row group number % ranks``, which gives ranks unequal numbers of rows and fails with
fewer row groups than ranks. Here shards are row ranges, cut to the row, whatever the files look like.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from hvdspark.errors import EmptyDatasetError
from hvdspark.plan import GroupRead, RowGroup, ShardPlan


def plan_shards(
    groups: Sequence[RowGroup],
    size: int,
    batch_rows: int,
    *,
    keep_order: bool,
    seed: int = 0,
    shares: tuple[int, ...] | None = None,
    lots: tuple[int, ...] | None = None,
) -> ShardPlan:
    """Share the rows of a split among the ranks.

    Parameters
    ----------
    groups
        Row groups of the split.
    size
        Number of ranks.
    batch_rows
        Rows per rank and step.
    keep_order
        ``True`` keeps the order of the data over all ranks: step ``s`` holds the rows that one process with a batch
        of ``size * batch_rows`` would see in step ``s``; a row group is then read by every rank. ``False`` deals whole
        row groups in a random order to the ranks, so that data sorted by some column does not end up sorted by rank,
        and each rank reads what is its own.
    seed
        Seed of that order.
    shares
        Rows of each rank, where they lie with the ranks already, in the order of the groups; nothing moves then, and
        they come in the order in which they lie or, by the seed, in a random one.
    lots
        Which share that is for each rank.

    Raises
    ------
    EmptyDatasetError
        When there is no row.
    """
    filled = [group for group in groups if group.rows]
    if not filled:
        raise EmptyDatasetError("the dataset has no rows to share among the ranks; check the input DataFrame")
    if shares is not None:
        return ShardPlan(groups=tuple(filled), size=size, batch_rows=batch_rows, shares=shares, lots=lots)
    if not keep_order:
        order = np.random.default_rng(seed).permutation(len(filled))
        filled = [filled[index] for index in order]
    return ShardPlan(groups=tuple(filled), size=size, batch_rows=batch_rows, striped=keep_order)


def reads_of(plan: ShardPlan, rank: int) -> list[GroupRead]:
    """List what a rank reads, row group by row group, in order."""
    offsets = [0, *itertools.accumulate(group.rows for group in plan.groups)]
    pieces: dict[int, list[tuple[int, int]]] = {}
    for start, stop in _intervals(plan, rank):
        while start < stop:
            index = bisect.bisect_right(offsets, start) - 1
            end = min(stop, offsets[index + 1])
            piece = (start - offsets[index], end - offsets[index])
            _append(pieces.setdefault(index, []), piece)
            start = end
    return [GroupRead(plan.groups[index], tuple(found)) for index, found in pieces.items()]


def filler_read(plan: ShardPlan, rank: int) -> GroupRead:
    """Name one row that a rank can compute on, with weight zero, in a step in which it has no row of its own."""
    if plan.shares is None:
        return GroupRead(plan.groups[0], ((0, 1),))
    # Those of other ranks may be out of reach.
    own = reads_of(plan, rank)[0]
    return GroupRead(own.group, ((0, 1),))


def _intervals(plan: ShardPlan, rank: int) -> Iterator[tuple[int, int]]:
    """Yield the rank's row intervals in the numbering of the whole split."""
    if not plan.striped:
        start = sum(plan.rows_of(peer) for peer in range(rank))
        yield start, start + plan.rows_of(rank)
        return
    for step in range(plan.steps):
        first = step * plan.batch_rows * plan.size
        start = first + sum(plan.rows_at(peer, step) for peer in range(rank))
        yield start, start + plan.rows_at(rank, step)


def _append(pieces: list[tuple[int, int]], piece: tuple[int, int]) -> None:
    """Add a piece, joined to the one before where it goes on from there."""
    if pieces and pieces[-1][1] == piece[0]:
        piece = (pieces.pop()[0], piece[1])
    pieces.append(piece)
