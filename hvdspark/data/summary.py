"""By a few numbers, what the rows of a training are, so that a run does not go on with others that are as many.

The numbers depend neither on the order of the rows nor on how files or tasks share them, and are compared with some
room: whoever computes the rows anew, in another session or with other partitions, may well get other last digits.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hvdspark.data.blocks import AnyBlock, Blocks
from hvdspark.data.cells import CellBlock
from hvdspark.data.sparse import SparseBlock

if TYPE_CHECKING:
    import pyarrow.parquet as pq

# By what was measured and the column's name; what two summaries do not have in common says nothing.
Summary = Mapping[str, float]

_ROOM = 1e-6

# Of wide rows the first values tell enough.
_VALUES = 16


def summarize(blocks: Blocks) -> dict[str, float]:
    """Measure rows: the sum of each column's absolute values, or how many bytes its texts or images have."""
    return {f"sum of {name}": _size(block) for name, block in blocks.items()}


def added(summaries: Iterable[Summary]) -> dict[str, float]:
    """Return the summary of the rows of several."""
    total: dict[str, float] = {}
    for summary in summaries:
        for name, value in summary.items():
            total[name] = total.get(name, 0.0) + value
    return total


def summarize_footers(footers: Sequence[pq.FileMetaData], names: Iterable[str]) -> dict[str, float]:
    """Measure rows by what the footers of Parquet files say: the least and the greatest value of each column."""
    found: dict[str, list[Any]] = {}
    wanted = frozenset(names)
    for footer in footers:
        for group, place in itertools.product(range(footer.num_row_groups), range(footer.num_columns)):
            chunk = footer.row_group(group).column(place)
            # Whatever a column is made of lies below its name.
            if chunk.path_in_schema.partition(".")[0] in wanted:
                found.setdefault(chunk.path_in_schema, []).append(chunk)
    summary = {}
    for path, chunks in found.items():
        # Not every type of value can be read, or compared over files.
        with contextlib.suppress(TypeError, ValueError, pa.ArrowException):
            known = [chunk.statistics for chunk in chunks if chunk.statistics and chunk.statistics.has_min_max]
            if known:
                summary[f"least of {path}"] = _number(min(statistics.min for statistics in known))
                summary[f"greatest of {path}"] = _number(max(statistics.max for statistics in known))
    return summary


def differing(before: Summary, now: Summary) -> str | None:
    """Return the name of what differs between two summaries; ``None`` where they may be of the same rows."""
    for name in sorted(before.keys() & now.keys()):
        first, second = before[name], now[name]
        are_finite = math.isfinite(first), math.isfinite(second)
        if are_finite[0] != are_finite[1] or (all(are_finite) and not math.isclose(first, second, rel_tol=_ROOM)):
            return name
    return None


def _size(block: AnyBlock) -> float:
    with np.errstate(all="ignore"):  # whatever is wrong with the values shows where they are trained on
        if isinstance(block, CellBlock):
            return float(pc.sum(pc.binary_length(block.cells)).as_py() or 0)
        if isinstance(block, SparseBlock):
            return float((np.abs(block.values) * (block.indices + 1.0)).sum())
        if not isinstance(block, np.ndarray) or block.dtype.kind not in "biuf" or not block.size:
            return 0.0
        values = block.reshape(len(block), -1)[:, :_VALUES]
        return float((values if values.dtype.kind in "bu" else np.abs(values)).sum(dtype=np.float64))


def _number(value: Any) -> float:
    """Return a number for any value; equal ones for equal values."""
    return float(value) if isinstance(value, int | float) else float(zlib.crc32(repr(value).encode()))
