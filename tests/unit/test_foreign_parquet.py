"""Parquet files of other programs, as they are surveyed and read where they lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvdspark.data import parquet
from hvdspark.data.parquet import survey
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
