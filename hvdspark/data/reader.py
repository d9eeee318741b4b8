"""A rank's shard, from Parquet to NumPy blocks, through Petastorm's Reader.

Petastorm brings the machinery (ventilator, worker pool, results queue); the row ranges and the decoding are ours:
``ShardReader`` ventilates exactly the :class:`~hvdspark.plan.GroupRead` items of the shard, and ``_BlockWorker``
turns a row group into blocks without a copy per row. Petastorm's own metadata is never loaded, because it is a
pickle; the manifest says all that is needed.
"""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from typing import Any

from hvdspark.data.blocks import Blocks, concatenate
from hvdspark.data.files import read_columns
from hvdspark.data.petastorm_compat import (
    ConcurrentVentilator,
    EmptyResultError,
    Reader,
    ThreadPool,
    WorkerBase,
)
from hvdspark.data.storage import from_parquet
from hvdspark.errors import CorruptDatasetError
from hvdspark.plan import ColumnSpec, GroupRead
from hvdspark.store import Store


class ShardReader(Reader):  # type: ignore[misc]
    """Petastorm's Reader over exact row ranges: one pass, in the order given.

    Iterate for ``{column: block}``, one item per row group; use as a context manager.

    Parameters
    ----------
    store, dataset
        Where the dataset is.
    columns
        The columns to read.
    reads
        The rows to read.
    workers
        Threads that read and decode.
    verify
        Whether to check the files' checksums, which costs about as much as reading does.
    """

    def __init__(
        self,
        store: Store,
        dataset: str,
        columns: Sequence[ColumnSpec],
        reads: Sequence[GroupRead],
        workers: int = 2,
        *,
        verify: bool = False,
    ) -> None:
        # Reader.__init__ lists the folder, unpickles a Unischema and cuts shards by whole row groups. None of that is
        # wanted, so the parts that its other methods use are set here instead.
        self._results_queue_reader = _BlockQueueReader()
        self._workers_pool = ThreadPool(max(1, min(workers, len(reads))))
        self.ventilator = ConcurrentVentilator(
            self._workers_pool.ventilate,
            [{"read": read} for read in reads],
            iterations=1,
            max_ventilation_queue_size=self._workers_pool.workers_count + 2,
            # By default it looks every 10 ms whether there is room, which bounds the row groups per second.
            ventilation_interval=0.001,
        )
        self.is_batched_reader = True
        self.num_epochs = 1
        self.ngram = None
        self.schema = None
        self.cache = None
        self.last_row_consumed = False
        self.stopped = False
        self._workers_pool.start(_BlockWorker, (store, dataset, tuple(columns), verify), ventilator=self.ventilator)

    def __exit__(self, *_: object) -> None:
        # Not the base class's: that one prints to the standard output.
        self.stop()
        self.join()


class _BlockQueueReader:
    """Hands the pool's results on as they are."""

    batched_output = True

    def read_next(self, pool: ThreadPool, _schema: Any, _ngram: Any) -> Blocks:
        try:
            blocks: Blocks = pool.get_results()
        except EmptyResultError:
            raise StopIteration from None
        return blocks


class _BlockWorker(WorkerBase):  # type: ignore[misc]
    """Reads one row group's pieces and publishes them as blocks."""

    def process(self, read: GroupRead) -> None:
        store, dataset, columns, verify = self.args
        self.publish_func(read_group(store, dataset, columns, read, verify=verify))

    @staticmethod
    def new_results_queue_reader() -> _BlockQueueReader:
        return _BlockQueueReader()


def read_group(
    store: Store, dataset: str, columns: Sequence[ColumnSpec], read: GroupRead, *, verify: bool = True
) -> Blocks:
    """Read the pieces of one row group.

    Parameters
    ----------
    store, dataset, columns
        As for :class:`ShardReader`.
    read
        The pieces.
    verify
        Whether to check the checksums of the pages, and that every cell is what it should be.

    Returns
    -------
    dict of str to block
        Per column a block of the rows (see :mod:`hvdspark.data.blocks`).

    Raises
    ------
    CorruptDatasetError
        When the file is missing or damaged, or holds another number of rows than the manifest says.
    """
    group = read.group
    place = posixpath.join(dataset, group.path)
    try:
        found = read_columns(store, place, group.index, [spec.name for spec in columns], verify=verify)
        blocks = {spec.name: from_parquet(found[spec.name], spec, verify=verify) for spec in columns}
    except (OSError, ValueError, IndexError, KeyError) as exc:
        raise CorruptDatasetError(
            f"row group {group.index} of {store.url_of(place)} cannot be read: {exc}. {_remedy(columns)}"
        ) from exc
    rows = len(found[columns[0].name])
    if rows != group.rows:
        raise CorruptDatasetError(
            f"row group {group.index} of {store.url_of(place)} has {rows} rows, but the"
            f" manifest says {group.rows}; run fit() again to write the dataset anew"
        )
    if read.rows == group.rows:
        return blocks
    return {name: concatenate([block[start:stop] for start, stop in read.pieces]) for name, block in blocks.items()}


def _remedy(columns: Sequence[ColumnSpec]) -> str:
    if all(column.packed for column in columns):
        return "The dataset was changed after it was written; run fit() again to write it anew."
    return (
        "The file is damaged, was changed meanwhile, or holds other columns than the first one; write it anew, or read"
        " the files with Spark and fit() the DataFrame."
    )
