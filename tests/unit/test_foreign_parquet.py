"""Parquet files of other programs, as they are surveyed and read where they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvdspark.data import parquet
from hvdspark.data.blocks import concatenate
from hvdspark.data.parquet import Survey, survey
from hvdspark.data.reader import ShardReader
from hvdspark.data.shards import plan_shards, reads_of
from hvdspark.errors import ValueRangeError
from hvdspark.plan import ColumnSpec


class Counted:
    """Stands before something and its parts, and counts how often a column of them is asked for."""

    looked = 0

    def __init__(self, behind: Any) -> None:
        self._behind = behind

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._behind, name)
        if name == "column":
            Counted.looked += 1
            return found
        if name == "row_group":
            return lambda index: Counted(found(index))
        return Counted(found) if name == "schema" else found


def test_a_survey_looks_at_each_column_of_a_footer_a_few_times_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"c{number}" for number in range(200)]
    table = pa.table(dict.fromkeys(names, np.arange(2, dtype="f4")))
    for file in ("a", "b"):
        pq.write_table(table, tmp_path / f"{file}.parquet")
    footer = parquet._footer
    monkeypatch.setattr(parquet, "_footer", lambda store, path: Counted(footer(store, path)))
    found = survey(str(tmp_path), [ColumnSpec(name, "scalar", "float32") for name in names])
    assert [group.rows for group in found.groups] == [2, 2]
    assert 2 * len(names) <= Counted.looked <= 10 * len(names)


def read(found: Survey) -> dict[str, Any]:
    """Read the rows as one rank does."""
    reads = reads_of(plan_shards(found.groups, 1, 10, keep_order=True), 0)
    with ShardReader(found.store, "", found.columns, reads) as reader:
        items = list(reader)
    return {name: concatenate([item[name] for item in items]) for name in items[0]}


TIME = ColumnSpec("t", "scalar", "int64", fed_as=("float32",))


def test_whole_numbers_that_the_model_would_round_are_found_in_the_footers(tmp_path: Path) -> None:
    for file, values in (("a", [1, 2]), ("b", [3, 4, 1_700_000_001])):
        pq.write_table(pa.table({"t": values}), tmp_path / f"{file}.parquet", row_group_size=2)
    with pytest.raises(ValueRangeError, match=r"'t' has the value 1700000001, which float32 cannot hold exactly"):
        survey(str(tmp_path), [TIME])


@pytest.mark.parametrize("statistics", [True, False])
def test_whole_numbers_that_the_model_would_round_are_found_by_the_ranks_where_footers_do_not_tell(
    tmp_path: Path, statistics: bool
) -> None:
    def write(*last: int) -> None:
        # A survey reads the first row group.
        table = pa.table({"t": [0, 0, 0, *last]})
        pq.write_table(table, tmp_path / "a.parquet", row_group_size=3, write_statistics=statistics)

    write(0, 2**24 + 1, 2**25)
    found = survey(str(tmp_path), [TIME])
    with pytest.raises(ValueRangeError, match=r"'t' has the value 16777217"):
        read(found)
    write(0, 2**24 + 2, 2**25)
    assert read(survey(str(tmp_path), [TIME]))["t"].ravel().tolist() == [0, 0, 0, 0, 2**24 + 2, 2**25]
