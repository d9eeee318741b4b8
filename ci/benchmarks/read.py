"""Rows per second of the shard reader, beside bare pyarrow on the same files and Petastorm's own reader."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import pyarrow.parquet as pq

from benchmarks import data, dataset
from benchmarks.comparison import Comparison, interleaved, seconds
from benchmarks.dataset import KINDS, Dataset
from benchmarks.session import cores, spark_session
from hvdspark import Store
from hvdspark.data.petastorm_compat import install
from hvdspark.data.reader import ShardReader

TARGET = 0.9
PACKED_TARGET = 3.0


def measure(*, quick: bool, kind: str) -> Iterator[Comparison]:
    """Read one kind of rows by all readers in turns, all files in the page cache."""
    title, repeats = f"read, {KINDS[kind].title}", 5 if quick else 15
    row_bytes = dataset.IMAGE_BYTES if kind == "images" else 4 * dataset.WIDTH
    rows = (100 << 20 if quick else 400 << 20) // row_bytes
    with tempfile.TemporaryDirectory() as folder:
        # A JVM in this process would disturb.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as writer:
            written = writer.submit(prepare, Path(folder), kind, rows).result()
        plain = sorted(map(str, Path(folder, "plain").glob("*.parquet")))
        readers = [
            partial(read_shard, written),
            partial(read_bare, written.files),
            partial(read_petastorm, written.url),
        ]
        if kind == "array":
            readers.append(partial(read_bare, plain))
        for reader in readers:
            reader()
        ours, *others = interleaved(repeats, *(partial(_rate, rows, reader) for reader in readers))
    yield Comparison(f"{title} vs bare pyarrow", "rows/s", ours, others[0], TARGET)
    yield Comparison(f"{title} vs Petastorm's make_batch_reader", "rows/s", ours, others[1])
    if kind == "array":
        yield Comparison(f"{title} vs pyarrow on array<float>", "rows/s", ours, others[2], PACKED_TARGET)


def prepare(folder: Path, kind: str, rows: int) -> Dataset:
    """Write the rows as plain Parquet, and that as a dataset."""
    plain = data.write_parquet(folder / "plain", KINDS[kind].make(rows))
    with spark_session(f"local[{cores()}]") as spark:
        return dataset.write(spark.read.parquet(str(plain)), KINDS[kind], Store.create(folder / "store"))


def read_shard(written: Dataset) -> int:
    """Read a dataset as a rank does; returns the rows."""
    with ShardReader(written.store, written.folder, written.columns, written.reads) as reader:
        return sum(len(next(iter(blocks.values()))) for blocks in reader)


def read_bare(files: Sequence[str]) -> int:
    """Read files with pyarrow alone, a row group at a time, to NumPy; returns the rows."""
    rows = 0
    for path in files:
        with pq.ParquetFile(path, memory_map=True) as parquet:
            for group in range(parquet.num_row_groups):
                blocks = [dataset.to_numpy(column) for column in parquet.read_row_group(group).columns]
                rows += len(blocks[0])
    return rows


def read_petastorm(url: str) -> int:
    """Read a dataset with Petastorm as its users do; returns the rows."""
    install()
    from petastorm import make_batch_reader

    with make_batch_reader(url, num_epochs=1, shuffle_row_groups=False) as reader:
        return sum(len(batch[0]) for batch in reader)


def _rate(rows: int, reader: Callable[[], int]) -> float:
    found = 0

    def work() -> None:
        nonlocal found
        found = reader()

    taken = seconds(work)
    if found != rows:
        raise ValueError(f"{reader} found {found} of {rows} rows")
    return rows / taken
