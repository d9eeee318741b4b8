"""Petastorm on today's pyarrow and NumPy, and the races of its thread pool."""

from __future__ import annotations

import importlib.util
import pickle
import queue
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hvdspark.data import petastorm_compat  # must come before petastorm

# isort: split
from petastorm import make_batch_reader
from petastorm import reader as reader_module
from petastorm.workers_pool import EmptyResultError, VentilatedItemProcessedMessage, thread_pool


@pytest.mark.parametrize(
    "program",
    [
        "import hvdspark.data.petastorm_compat; from petastorm import make_reader, make_batch_reader",
        "import hvdspark.data.reader",
        "import hvdspark.data.materialize",
        "import hvdspark.data.reader, sys; assert not {'tensorflow', 'torch', 'pyspark.ml'} & set(sys.modules)",
    ],
)
def test_a_fresh_process_imports_it_without_a_warning(program: str) -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_installing_again_changes_nothing() -> None:
    def changed() -> list[Any]:
        pool = thread_pool.ThreadPool
        return [pool.all_workers_done, pool.current_worker_done, sys.modules["pyarrow.filesystem"], pa.localfs]

    before = changed()
    petastorm_compat.install()
    assert all(new is old for new, old in zip(changed(), before, strict=True))
    assert reader_module.pq.ParquetDataset is petastorm_compat.ParquetDataset


def test_the_rest_of_pyarrow_parquet_is_what_it_was() -> None:
    assert reader_module.pq.ParquetFile is pq.ParquetFile
    assert pq.ParquetDataset is not petastorm_compat.ParquetDataset


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "plain"
    root.mkdir()
    for number in range(3):
        table = pa.table({"x": np.arange(4) + 4 * number})
        pq.write_table(table, root / f"part-{number}.parquet", row_group_size=2)
    (root / "_SUCCESS").touch()
    (root / ".part-0.parquet.crc").write_bytes(b"crc")
    return root


def test_plain_parquet_is_read_row_by_row_through_two_threads(folder: Path) -> None:
    with make_batch_reader(
        f"file://{folder}", num_epochs=2, reader_pool_type="thread", workers_count=2, shuffle_row_groups=True
    ) as reader:
        found = np.concatenate([item.x for item in reader])
    assert sorted(found.tolist()) == sorted([*range(12)] * 2)


def test_a_dataset_lists_its_files_and_leaves_out_what_is_hidden(folder: Path) -> None:
    dataset = petastorm_compat.ParquetDataset(str(folder))
    assert [Path(piece.path).name for piece in dataset.pieces] == [f"part-{number}.parquet" for number in range(3)]
    assert dataset.schema.names == ["x"]
    assert (dataset.metadata, dataset.common_metadata) == (None, None)


def test_a_piece_survives_pickling_and_reads_its_row_group(folder: Path) -> None:
    whole = petastorm_compat.ParquetDataset(str(folder)).pieces[1]
    piece = petastorm_compat.ParquetDatasetPiece(whole.path, open_file_func=whole._open, row_group=1)
    again = pickle.loads(pickle.dumps(piece))
    assert again.read(columns=["x"])["x"].to_pylist() == [6, 7]
    assert pickle.loads(pickle.dumps(whole)).read()["x"].to_pylist() == [4, 5, 6, 7]


def test_hive_partitions_are_refused_because_their_values_would_be_lost(folder: Path) -> None:
    inner = folder / "day=1"
    inner.mkdir()
    (folder / "part-0.parquet").rename(inner / "part-0.parquet")
    with pytest.raises(NotImplementedError, match=r"day=1.*Hive partition"):
        make_batch_reader(f"file://{folder}", num_epochs=1)


def test_filters_are_refused_because_they_would_be_ignored(folder: Path) -> None:
    with pytest.raises(NotImplementedError, match=r"filters= is not supported"):
        make_batch_reader(f"file://{folder}", num_epochs=1, filters=[("x", ">", 3)])


def stock_thread_pool() -> type[Any]:
    """Load Petastorm's own class once more, without the repair."""
    assert thread_pool.__file__ is not None
    spec = importlib.util.spec_from_file_location("stock_thread_pool", thread_pool.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: type[Any] = module.ThreadPool
    return found


class LateVentilator:
    """Ventilates everything at the moment when it is asked for the ``late``-th time whether it is done.

    So it stands for a ventilator thread that gets its turn just then; its workers are done at once.
    """

    def __init__(self, pool: Any, items: int, late: int) -> None:
        self._pool, self._items, self._late, self._asked = pool, items, late, 0

    def completed(self) -> bool:
        self._asked += 1
        if self._asked == self._late:
            for number in range(self._items):
                worker = number % self._pool.workers_count
                self._pool.ventilate(number=number)
                self._pool._results_queues[worker].put(f"item {number}")
                self._pool._results_queues[worker].put(VentilatedItemProcessedMessage())
        return self._asked >= self._late

    def processed_item(self) -> None:
        pass


def results_of(pool_class: type[Any], workers: int, items: int, late: int) -> list[str]:
    """Collect what a pool hands out whose ventilator and workers act only when they are told to."""
    pool = pool_class(workers)
    pool._ventilator_queues = [queue.Queue() for _ in range(workers)]
    pool._results_queues = [queue.Queue() for _ in range(workers)]
    pool._ventilator = LateVentilator(pool, items, late)
    found: list[str] = []
    # One more than there are: the last call says that there are no more.
    for _ in range(items + 1):
        try:
            found.append(pool.get_results())
        except EmptyResultError:
            return found
    raise AssertionError("the pool never ends")


@pytest.mark.parametrize("late", [1, 2, 3, 4])
def test_what_is_ventilated_between_two_looks_is_not_lost(late: int) -> None:
    items = ["item 0", "item 1", "item 2"]
    assert sorted(results_of(thread_pool.ThreadPool, 2, 3, late)) == items


def test_the_stock_thread_pool_loses_it() -> None:
    assert results_of(stock_thread_pool(), 2, 3, late=1) == []


def in_order(pool_class: type[Any], workers: int, late: int) -> bool:
    return results_of(pool_class, workers, 5, late) == [f"item {number}" for number in range(5)]


@pytest.mark.parametrize("workers", [2, 3])
def test_items_come_in_the_order_in_which_they_were_ventilated(workers: int) -> None:
    assert all(in_order(thread_pool.ThreadPool, workers, late) for late in range(1, 7))


def test_the_stock_thread_pool_mixes_them_up() -> None:
    assert not in_order(stock_thread_pool(), 2, late=3)


def test_one_thread_keeps_the_order() -> None:
    assert all(in_order(thread_pool.ThreadPool, 1, late) for late in range(1, 5))
