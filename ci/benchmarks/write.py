"""Rows per second of writing a dataset, beside Spark's plain write of the same rows."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks import data, dataset
from benchmarks.comparison import Comparison, interleaved, seconds
from benchmarks.dataset import KINDS
from benchmarks.session import cores, spark_session
from hvdspark import Store

TARGET = 0.9


def measure(*, quick: bool, kind: str) -> Iterator[Comparison]:
    """Write one kind of rows from Spark's memory into new folders, in turns."""
    rows, repeats = (200_000, 3) if quick else (1_000_000, 5)
    with tempfile.TemporaryDirectory() as name, spark_session(f"local[{cores()}]") as spark:
        folder = Path(name)
        plain = data.write_parquet(folder / "plain", KINDS[kind].make(rows))
        df = spark.read.parquet(str(plain)).cache()
        df.count()

        def write_ours() -> float:
            store = Store.create(folder / "store")
            return rows / _emptied(folder / "store", seconds(lambda: dataset.write(df, KINDS[kind], store)))

        def write_plain() -> float:
            return rows / _emptied(folder / "out", seconds(lambda: df.write.parquet(str(folder / "out"))))

        # The first round compiles Spark's code.
        interleaved(1 if quick else 2, write_ours, write_plain)
        ours, theirs = interleaved(repeats, write_ours, write_plain)
    yield Comparison(f"write, {KINDS[kind].title} vs Spark's df.write.parquet", "rows/s", ours, theirs, TARGET)


def _emptied(folder: Path, taken: float) -> float:
    """Delete what was written, which also keeps a later write from finding it done."""
    shutil.rmtree(folder)
    return taken
