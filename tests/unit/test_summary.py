"""What tells the rows of a training from others: the same for the same rows, however they lie."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdspark.data.parquet import survey
from hvdspark.data.partitions import Split
from hvdspark.data.sparse import SparseBlock
from hvdspark.data.summary import added, differing, summarize
from hvdspark.plan import ColumnSpec, Manifest

COLUMNS = (
    ColumnSpec("x", "scalar", "float32"),
    ColumnSpec("v", "array", "float64", 3, (3,)),
    ColumnSpec("s", "string", "string", None),
)


def rows_of(seed: int, count: int = 300) -> pa.RecordBatch:
    random = np.random.default_rng(seed)
    return pa.RecordBatch.from_pydict(
        {
            "x": random.normal(size=count).astype("float32"),
            "v": list(random.normal(size=(count, 3))),
            "s": [f"text {number}" for number in random.integers(0, 9999, count)],
        }
    )


def parts(batch: pa.RecordBatch, count: int) -> list[list[pa.RecordBatch]]:
    size = -(-batch.num_rows // count)
    return [[batch.slice(start, size)] for start in range(0, batch.num_rows, size)]


def test_rows_are_known_again_in_another_order_and_other_partitions(write_dataset: Callable[..., Any]) -> None:
    rows = rows_of(1)
    shuffled = rows.take(np.random.default_rng(2).permutation(rows.num_rows))
    before = write_dataset(COLUMNS, parts(rows, 2)).manifest
    again = write_dataset(COLUMNS, parts(shuffled, 5), group_bytes=500).manifest
    assert set(before.summary) == {"sum of x", "sum of v", "sum of s"}
    assert differing(before.summary, again.summary) is None
    assert Manifest.from_json(before.to_json()).summary == before.summary
    other = write_dataset(COLUMNS, parts(rows_of(3), 2)).manifest
    assert other.rows("train") == before.rows("train")
    assert differing(before.summary, other.summary) is not None


def test_which_rows_are_held_out_does_not_matter(write_dataset: Callable[..., Any]) -> None:
    found = [
        write_dataset(COLUMNS, parts(rows_of(1), 2), Split(fraction=0.3, seed=seed)).manifest.summary for seed in (1, 2)
    ]
    assert differing(*found) is None


def test_files_of_others_are_known_by_their_footers(tmp_path: Path) -> None:
    def written(name: str, rows: pa.RecordBatch, group_rows: int) -> Any:
        (tmp_path / name).mkdir()
        pq.write_table(pa.Table.from_batches([rows]), tmp_path / name / "part-0.parquet", row_group_size=group_rows)
        return survey(str(tmp_path / name), COLUMNS).summary

    rows = rows_of(1)
    before = written("before", rows, 100)
    assert {"least of x", "greatest of x", "least of s"} <= set(before)
    # Written anew: another name, other groups, another order.
    assert differing(before, written("again", rows.take(np.arange(rows.num_rows)[::-1]), 70)) is None
    assert differing(before, written("other", rows_of(2), 100)) is not None


@given(st.lists(st.floats(width=32), min_size=1, max_size=40), st.integers(1, 5), st.randoms(use_true_random=False))
def test_neither_order_nor_parts_matter_whatever_the_values(values: list[float], count: int, random: Any) -> None:
    whole = summarize({"x": np.array(values, "float32").reshape(-1, 1)})
    random.shuffle(values)
    pieces = np.array_split(np.array(values, "float32").reshape(-1, 1), count)
    found = json.loads(json.dumps(added(summarize({"x": piece}) for piece in pieces)))
    assert differing(whole, found) is None


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", "int64", "float16", "float32", "float64"])
def test_one_other_value_is_noticed(dtype: str) -> None:
    values = np.arange(1000).reshape(-1, 2).astype(dtype)
    other = values.copy()
    other[7] = 0 if values[7].any() else 1
    assert differing(summarize({"x": values}), summarize({"x": other})) == "sum of x"
    last_digits = values.astype("float64") * (1 + 1e-12)
    assert differing(summarize({"x": values}), summarize({"x": last_digits})) is None or dtype == "bool"


def test_a_sparse_row_with_its_entry_elsewhere_is_noticed() -> None:
    def block(places: list[int]) -> SparseBlock:
        return SparseBlock(np.arange(4), np.array(places), np.ones(3, "float32"), 9)

    before = summarize({"v": block([1, 5, 2])})
    assert differing(before, summarize({"v": block([2, 1, 5])})) is None
    assert differing(before, summarize({"v": block([1, 5, 3])})) == "sum of v"
    assert (
        differing(before, added(summarize({"v": block([1, 5, 2])[rows]}) for rows in (slice(0, 1), slice(1, 3))))
        is None
    )


def test_what_only_one_of_two_knows_says_nothing() -> None:
    assert differing({}, {"sum of x": 1.0}) is None
    assert differing({"least of x": 1.0}, {"sum of x": 2.0}) is None
    assert differing({"sum of x": 1.0}, {"sum of x": float("nan")}) == "sum of x"
