"""Rows straight from Spark's tasks to their ranks, without a dataset in between.

Each task of the barrier stage writes its partition's rows to Arrow files on its own host's disk, which the rank maps
into memory; they go with the task. What the tasks found is told to all of them, so that each makes the same plan.

Which rank's a row is, and where it comes among that rank's, follows from its place in the DataFrame's partitions: not
from when it arrives, nor from which host has which rank.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa
from pyspark.sql import functions as F
from pyspark.sql import types as T

from hvdspark.data.capacity import scratch_folder
from hvdspark.data.files import ARROW
from hvdspark.data.materialize import by_position, merge
from hvdspark.data.partitions import TRAIN, VAL, PartitionReport, PartitionWriter, Split, own_partition
from hvdspark.data.planning import FitDraft
from hvdspark.errors import EmptyDatasetError
from hvdspark.plan import FitPlan
from hvdspark.store import Store

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, SparkSession

_ROWS = "rows"

# No column of the user's is called that.
_HELD_OUT = "hvdspark: held out"

# The column of a row's place, and how many bits of it are for the place within the partition.
_PLACE, _PLACE_BITS = "place", 33


@dataclass(frozen=True)
class RowFeed:
    """What a task does with its partition's rows, so that its rank can train on them; travels to every task.

    Parameters
    ----------
    names
        Names of the columns that the batches have, by position.
    draft
        The fit.
    """

    names: tuple[str, ...]
    draft: FitDraft

    @contextmanager
    def taken(self, batches: Iterable[pa.RecordBatch]) -> Iterator[TakenRows]:
        """Keep a partition's rows on this host for the time of a block."""
        with tempfile.TemporaryDirectory(prefix="hvdspark-rows-", dir=scratch_folder()) as folder:
            store = Store.create(folder)
            writer = PartitionWriter(self.draft.columns, self.draft.split, store.ref(), _ROWS, suffix=ARROW)
            report = writer.write(batch.rename_columns(list(self.names)) for batch in batches)
            yield TakenRows(self.draft, store, report.to_json())


@dataclass(frozen=True)
class TakenRows:
    """A partition's rows on the host of its task.

    Parameters
    ----------
    draft
        The fit that they are for.
    store
        Where they are.
    report
        What the task found, as JSON.
    """

    draft: FitDraft
    store: Store
    report: str

    def plan(self, reports: Sequence[str]) -> FitPlan:
        """Plan the fit, as every other task does.

        Parameters
        ----------
        reports
            The reports of all tasks, by rank.

        Raises
        ------
        DataError, SchemaError
            When the rows cannot be trained on; the same in every task.
        """
        given = [PartitionReport.from_json(text) for text in reports]
        # By rank, not by partition: the plan's row groups are in the order of the ranks that have them.
        found = [dataclasses.replace(report, partition=rank) for rank, report in enumerate(given)]
        manifest = merge(self.draft.columns, found, self.draft.split)
        shares = {
            split: tuple(sum(group.rows for group in report.groups.get(split, ())) for report in found)
            for split in (TRAIN, VAL)
        }
        if 0 in shares[TRAIN]:
            raise EmptyDatasetError(
                f"rank {shares[TRAIN].index(0)} of {len(found)} was given none of the {manifest.rows(TRAIN)} training"
                " rows; lower num_proc, or leave out data='direct', which can share out fewer rows than ranks"
            )
        lots = tuple(report.partition for report in given)
        return self.draft.complete(manifest, self.store.ref(), _ROWS, shares, lots)


@dataclass(frozen=True)
class FedStage:
    """Rows that come with the tasks of a barrier stage.

    Parameters
    ----------
    frame
        The rows, one partition per task.
    feed
        What each task does with its own.
    """

    frame: DataFrame
    feed: RowFeed


def fed_stage(df: DataFrame, draft: FitDraft) -> FedStage:
    """Share a DataFrame's rows out among the ranks of a fit.

    Of every ``size`` rows that follow each other in a partition each rank gets one, so that all see the DataFrame's
    order, and differ by no more rows than there are partitions. The same partitions give the same shares in the same
    order.

    Parameters
    ----------
    df
        The rows.
    draft
        The fit. Of its split come the same rows as in a dataset.
    """
    split = draft.split
    names = split.names_read(draft.columns)
    rows = by_position(df, names)
    if split.fraction:
        marked = T.StructType([*rows.schema.fields, T.StructField(f"c{len(names)}", T.BooleanType())])
        rows = rows.mapInArrow(_hold_out(split), marked)
        names.append(_HELD_OUT)
        draft = dataclasses.replace(draft, split=Split(column=_HELD_OUT, seed=split.seed))
    return FedStage(_dealt(rows, draft.size), RowFeed(tuple(names), draft))


def _dealt(rows: DataFrame, size: int) -> DataFrame:
    """Deal rows to as many partitions, each in the order in which the rows were."""
    # Spark's number for a row: that of its partition, and in the lower bits its place there.
    partition, place = f"shiftright({_PLACE}, {_PLACE_BITS})", f"({_PLACE} & {(1 << _PLACE_BITS) - 1})"
    # Each round begins with another rank, so that data of some period are not sorted by rank.
    turn = f"pmod({place} + hash({partition}, {place} div {size}), {size})"
    keys = ", ".join(map(str, _keys(rows.sparkSession, size)))
    dealt = rows.withColumn(_PLACE, F.monotonically_increasing_id()).repartition(
        size, F.expr(f"element_at(array({keys}), int({turn}) + 1)")
    )
    # What arrives first is another row each time.
    return dealt.sortWithinPartitions(_PLACE).drop(_PLACE)


def _keys(session: SparkSession, size: int) -> list[int]:
    """Return for each of ``size`` partitions a number that Spark's hash sends there; runs no job."""
    # Enough numbers that none is missed: each is with a chance of exp(-32).
    query = f"SELECT transform(sequence(0, {32 * size}), key -> pmod(hash(key), {size})) AS homes FROM VALUES (0)"
    (row,) = session.sql(query).collect()
    keys = {home: key for key, home in enumerate(row["homes"])}
    return [keys[home] for home in range(size)]


def _hold_out(split: Split) -> Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """Make a function that marks validation rows in a last column, before rows leave their partition."""

    def mark(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        random = split.generator(own_partition())
        for batch in batches:
            columns = [*batch.columns, pa.array(random.random(batch.num_rows) < split.fraction)]
            yield pa.RecordBatch.from_arrays(columns, names=[*batch.schema.names, f"c{batch.num_columns}"])

    return mark
