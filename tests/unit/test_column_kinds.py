"""Columns of every kind, through the real way of writing and reading, and what is refused of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pyarrow as pa
from column_kinds import Column, plan_of, rows_of, tables
from hypothesis import given, settings
from hypothesis import strategies as st

from hvdspark.data.partitions import TRAIN
from hvdspark.data.reader import ShardReader
from hvdspark.data.schema import resolve
from hvdspark.data.shards import plan_shards, reads_of

Write = Callable[..., Any]


def to_batch(columns: dict[str, Column], rows: list[tuple[Any, ...]]) -> pa.RecordBatch:
    arrays = [column.to_arrow([row[place] for row in rows]) for place, column in enumerate(columns.values())]
    return pa.RecordBatch.from_arrays(arrays, names=list(columns))


@settings(max_examples=150)
@given(tables(), st.booleans(), st.sampled_from([1, 200, 1 << 20]), st.integers(1, 2))
def test_every_value_of_every_kind_comes_back_once(
    write_dataset: Write, table: Any, sparse: bool, group_bytes: int, ranks: int
) -> None:
    columns, parts = table
    specs, batch = plan_of(columns, sparse)
    written = write_dataset(
        specs, [[to_batch(columns, rows) for rows in batches] for batches in parts], group_bytes=group_bytes
    )
    resolve(batch, written.manifest.columns)
    found: Counter[Any] = Counter()
    plan = plan_shards(written.manifest.splits[TRAIN], ranks, 3, keep_order=True)
    for rank in range(ranks):
        with ShardReader(written.store, written.dataset, written.manifest.columns, reads_of(plan, rank)) as reader:
            for blocks in reader:
                found.update(zip(*[rows_of(blocks[name]) for name in columns], strict=True))
    assert found == Counter(
        tuple(column.row(value) for column, value in zip(columns.values(), row, strict=True))
        for batches in parts
        for rows in batches
        for row in rows
    )
