"""A rank's rows: in order, or shuffled as the seed says, and nothing left running."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from hvdspark.data.partitions import TRAIN
from hvdspark.data.reader import ShardReader, read_group
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
