"""What a Spark task does with its partition's rows: check them, split them, write them, and report what it wrote.

The names of its files are used by no other attempt at the same task, so that those of failed or speculative attempts
can lie about and are never read.
"""

from __future__ import annotations

import dataclasses
import json
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from hvdspark import errors
from hvdspark.data.arrays import to_block
from hvdspark.data.blocks import AnyBlock, Block, Blocks, storage_of
from hvdspark.data.files import PARQUET, RowFile
from hvdspark.data.images import ImageBlock
from hvdspark.data.lists import count_nulls, ragged
from hvdspark.data.sparse import SparseBlock
from hvdspark.data.summary import added, summarize
from hvdspark.errors import DataError, HvdSparkError, ImageError, NullValueError
from hvdspark.plan import ColumnSpec, RowGroup, Shape, Storage, StoreRef
from hvdspark.store import Store

TRAIN, VAL = "train", "val"


@dataclass(frozen=True)
class Split:
    """How rows are told into training and validation.

    Parameters
    ----------
    fraction
        Share of the rows to validate on, chosen at random by the seed.
    column
        Or a column: rows where it is true (not zero) are for validation.
    seed
        Seed of the choice; the same DataFrame, partitioning and seed give the same rows.
    """

    fraction: float = 0.0
    column: str | None = None
    seed: int = 0

    @property
    def has_val(self) -> bool:
        """Whether any row may go to validation."""
        return self.fraction > 0 or self.column is not None

    def names_read(self, columns: Sequence[ColumnSpec]) -> list[str]:
        """Name what must be read to store columns and to tell their rows apart, each column once."""
        names = [column.name for column in columns]
        return names if self.column is None or self.column in names else [*names, self.column]

    def generator(self, partition: int) -> np.random.Generator:
        """Return the generator that tells the rows of a partition apart, one number per row in order."""
        return np.random.default_rng([self.seed, partition])


def own_partition() -> int:
    """Return the number of the partition whose task this is; zero outside of Spark."""
    from pyspark import TaskContext

    context = TaskContext.get()
    return context.partitionId() if context is not None else 0


@dataclass(frozen=True)
class Layout:
    """How a column's rows turned out to be: the shape of one, and how they are stored."""

    shape: Shape
    storage: Storage

    @classmethod
    def of(cls, block: AnyBlock, name: str) -> Layout:
        """Tell how the rows of a block are; raises :class:`ImageError` for images of different sizes."""
        if isinstance(block, ImageBlock):
            return cls(block.common_shape(name), block.storage)
        if isinstance(block, SparseBlock):
            return cls((block.size,), block.storage)
        return cls(block.shape[1:] if isinstance(block, np.ndarray) else (1,), storage_of(block))

    def applied_to(self, spec: ColumnSpec) -> ColumnSpec:
        """Return a column as its rows turned out to be."""
        return dataclasses.replace(spec.with_shape(self.shape), storage=self.storage)

    def require_same(self, name: str, other: Layout) -> None:
        """Raise :class:`DataError` where rows of another layout are in the same column."""
        if other == self:
            return
        if other.storage == self.storage and len(other.shape) == len(self.shape) == 1:
            raise ragged(name, (self.shape[0], other.shape[0]))
        raise ImageError(
            f"column '{name}' holds rows of different kinds or shapes: {self} and {other}. Bring them to one before"
            " fit(); nothing is resized unasked.",
            column=name,
            expected=str(self),
            found=str(other),
        )

    def __str__(self) -> str:
        kind = "plain values" if self.storage == "dense" else self.storage.upper()
        return f"{kind} of shape {'x'.join(map(str, self.shape))}"


@dataclass
class PartitionReport:
    """What one task wrote and what it found, as it travels to the driver.

    Parameters
    ----------
    partition
        Number of the partition.
    groups
        Row groups by split.
    layouts
        How each column's rows are.
    nulls
        Nulls by column.
    refused
        By column the first other error of its rows.
    summary
        Of all rows, see :mod:`hvdspark.data.summary`.
    """

    partition: int
    groups: dict[str, list[RowGroup]] = field(default_factory=dict)
    layouts: dict[str, Layout] = field(default_factory=dict)
    nulls: dict[str, int] = field(default_factory=dict)
    refused: dict[str, HvdSparkError] = field(default_factory=dict)
    summary: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """Write the report as JSON text."""
        refused = {name: exc.to_plain() for name, exc in self.refused.items()}
        plain = dataclasses.asdict(dataclasses.replace(self, refused={}))
        return json.dumps({**plain, "refused": refused})

    @classmethod
    def from_json(cls, text: str) -> PartitionReport:
        """Read what :meth:`to_json` wrote."""
        data = json.loads(text)
        groups = {name: [RowGroup(**group) for group in found] for name, found in data["groups"].items()}
        layouts = {name: Layout(tuple(found["shape"]), found["storage"]) for name, found in data["layouts"].items()}
        refused = {name: errors.from_plain(found) for name, found in data["refused"].items()}
        return cls(data["partition"], groups, layouts, data["nulls"], refused, data["summary"])


@dataclass(frozen=True)
class PartitionWriter:
    """Writes one partition; an instance travels to every task."""

    columns: tuple[ColumnSpec, ...]
    split: Split
    store: StoreRef
    dataset: str
    suffix: str = PARQUET

    def write(self, batches: Iterable[pa.RecordBatch]) -> PartitionReport:
        """Write the partition's batches; a file that is not finished is removed when anything goes wrong."""
        partition = own_partition()
        report = PartitionReport(partition)
        random = self.split.generator(partition)
        # The random part keeps attempts of one task apart, wherever and whenever they run.
        stem = f"part-{partition:05d}-{uuid.uuid4().hex[:12]}{self.suffix}"
        files = {name: RowFile(Store.from_ref(self.store), self.dataset, f"{name}/{stem}") for name in (TRAIN, VAL)}
        try:
            for batch in batches:
                blocks = self._blocks(batch, report)
                held_out = self._held_out(batch, random, report)
                if blocks is None:
                    continue
                # Of all rows: where they come in another order, others of them are held out.
                report.summary = added([report.summary, summarize(blocks)])
                for name, mask in ((TRAIN, ~held_out), (VAL, held_out)):
                    if mask.any():
                        chosen = blocks if mask.all() else {key: block[mask] for key, block in blocks.items()}
                        files[name].append(chosen)
            for name, file in files.items():
                report.groups[name] = file.close()
        finally:
            for file in files.values():
                file.abort()
        return report

    def _blocks(self, batch: pa.RecordBatch, report: PartitionReport) -> Blocks | None:
        """Convert a batch; where a column cannot be, note why and go on, so that all nulls are counted."""
        blocks: Blocks = {}
        for spec in self.columns:
            known = report.layouts.get(spec.name)
            try:
                block = to_block(batch.column(spec.name), spec if known is None else spec.with_shape(known.shape))
                if batch.num_rows:
                    layout = Layout.of(block, spec.name)
                    report.layouts.setdefault(spec.name, layout).require_same(spec.name, layout)
            except NullValueError as exc:
                report.nulls[spec.name] = report.nulls.get(spec.name, 0) + exc.count
            except DataError as exc:
                report.refused.setdefault(spec.name, exc)
            else:
                blocks[spec.name] = block
        # Empty arrays are refused once the shapes of all partitions are known.
        has_empty = any(0 in layout.shape for layout in report.layouts.values())
        return None if report.nulls or report.refused or has_empty or not batch.num_rows else blocks

    def _held_out(self, batch: pa.RecordBatch, random: np.random.Generator, report: PartitionReport) -> Block:
        """Mark the batch's validation rows."""
        if self.split.column is None:
            return np.asarray(random.random(batch.num_rows) < self.split.fraction)
        column = batch.column(self.split.column)
        nulls = count_nulls(column)
        if nulls:
            report.nulls[self.split.column] = report.nulls.get(self.split.column, 0) + nulls
        nothing = False if pa.types.is_boolean(column.type) else 0
        return np.asarray(column.fill_null(nothing).to_numpy(zero_copy_only=False) != 0)
