"""Plain frozen values that cross processes: from the driver to the ranks, and back.

Nothing here imports anything of the project or of a framework, so that every process can read a plan.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

ColumnKind = Literal["scalar", "date", "timestamp", "array", "vector", "string", "binary", "image"]
Storage = Literal["dense", "sparse", "text", "png", "jpeg"]
Shape = tuple[int, ...]

# What may stand for a null, or at the end of a short array.
Filler = bool | int | float | str

CacheMode = Literal["auto", "memory", "disk", "none"]


@dataclass(frozen=True)
class ColumnSpec:
    """One column as it is stored.

    Parameters
    ----------
    name
        The column's name in the DataFrame.
    kind
        What it is in Spark: ``"scalar"`` (a number or boolean), ``"date"``, ``"timestamp"``, ``"array"`` (of numbers,
        nested or not), ``"vector"`` (Spark ML), ``"string"``, ``"binary"`` or ``"image"`` (Spark's struct).
    dtype
        NumPy dtype name of the values, such as ``"float32"``; ``"string"`` for strings.
    size
        Values per row: 1 for a scalar; ``None`` for what only the rows can tell.
    shape
        Shape of a row with more than one axis; ``None`` for a flat one.
    storage
        ``"dense"``: every value; ``"sparse"``: indices and values of those that are not zero; ``"text"``; ``"png"`` and
        ``"jpeg"``: images as they came.
    fill
        What stands for a null; ``None`` refuses nulls.
    padding
        What fills up rows that are shorter than ``size``; ``None`` refuses them.
    packed
        Whether it lies as this library writes it; otherwise as Spark does.
    fed_as
        What the model takes the values as, where that does not hold all that ``dtype`` does: NumPy dtype names. A value
        that one of them cannot hold is refused when it is first seen.
    """

    name: str
    kind: ColumnKind
    dtype: str
    size: int | None = 1
    shape: Shape | None = None
    storage: Storage = "dense"
    fill: Filler | None = None
    padding: Filler | None = None
    packed: bool = True
    fed_as: tuple[str, ...] = ()

    @property
    def row_shape(self) -> Shape | None:
        """Shape of a row's values, where it is known."""
        if self.shape is not None or self.size is None:
            return self.shape
        return (self.size,)

    def with_shape(self, shape: Shape) -> ColumnSpec:
        """Return the column with the shape of its rows."""
        return replace(self, size=math.prod(shape), shape=shape if len(shape) > 1 else None)


@dataclass(frozen=True)
class TensorSpec:
    """One input or label tensor of the model and the columns that fill it, in order.

    Parameters
    ----------
    columns
        Names of the columns; several are concatenated along the last axis.
    shape
        Shape of one row's tensor, without the batch axis; ``None`` means that of the columns.
    dtype
        NumPy dtype that the model wants, or ``"string"``; ``None`` keeps the columns' own.
    preferred_shape
        Where the shape is not known yet: the one to give it should the columns turn out to fill it; an axis of -1 takes
        what they leave for it.
    """

    columns: tuple[str, ...]
    shape: Shape | None = None
    dtype: str | None = None
    preferred_shape: Shape | None = None

    @property
    def size(self) -> int | None:
        """Values per row, where the shape is known."""
        return None if self.shape is None else math.prod(self.shape)

    @property
    def has_open_axis(self) -> bool:
        """Whether only the columns tell how long an axis is."""
        return self.shape is None and self.preferred_shape is not None and -1 in self.preferred_shape

    def shape_for(self, found: Shape) -> Shape | None:
        """Return the shape that rows of another one are given, or ``None`` where they do not fill it.

        A flat row fills any shape of as many values. A row with axes of its own fills a flat one, and one that has the
        same axes but for those of length one: no image goes through turned or reshaped.
        """
        wanted = self.shape if self.shape is not None else self.preferred_shape
        if wanted is None:
            return None
        own, axes = _long(found), _long(wanted)
        if len(own) > 1 and len(axes) > 1:
            if len(found) == len(wanted):
                return found if _matches(found, wanted) else None
            lengths = iter(own)
            return tuple(1 if axis == 1 else next(lengths) for axis in wanted) if _matches(own, axes) else None
        if wanted.count(-1) > 1:
            return None
        size = math.prod(found)
        fixed = math.prod(axis for axis in wanted if axis != -1)
        shape = tuple(size // max(fixed, 1) if axis == -1 else axis for axis in wanted)
        return shape if math.prod(shape) == size else None


def _long(shape: Shape) -> Shape:
    return tuple(axis for axis in shape if axis != 1)


def _matches(shape: Shape, wanted: Shape) -> bool:
    """Whether a shape is the one wanted, where an axis of -1 takes any length."""
    return len(shape) == len(wanted) and all(axis in (-1, length) for axis, length in zip(wanted, shape, strict=True))


@dataclass(frozen=True)
class ModelTensor:
    """An input or output of a model, as far as the model states it.

    Parameters
    ----------
    name
        The model's name for it.
    shape
        Without the batch axis; ``None`` where an axis may have any length.
    dtype
        NumPy dtype name; ``bfloat16`` for what NumPy does not have.
    """

    name: str
    shape: tuple[int | None, ...]
    dtype: str

    @property
    def size(self) -> int | None:
        """Values per row, or ``None`` where an axis is open."""
        return None if None in self.shape else math.prod(size or 0 for size in self.shape)


@dataclass(frozen=True)
class BatchSpec:
    """What a batch consists of: feature tensors, label tensors and an optional weight column."""

    features: tuple[TensorSpec, ...]
    labels: tuple[TensorSpec, ...]
    sample_weight: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that is needed, once, in the order features, labels, weight."""
        names = [name for tensor in (*self.features, *self.labels) for name in tensor.columns]
        if self.sample_weight is not None:
            names.append(self.sample_weight)
        return tuple(dict.fromkeys(names))


@dataclass(frozen=True)
class RowGroup:
    """A Parquet row group of a materialized dataset.

    Parameters
    ----------
    path
        Path of the file, relative to the dataset's folder.
    index
        Number of the row group within the file.
    rows
        Rows in it.
    """

    path: str
    index: int
    rows: int


@dataclass(frozen=True)
class GroupRead:
    """Rows that a rank takes from one row group.

    Parameters
    ----------
    group
        The row group.
    pieces
        Row intervals ``(start, stop)`` within it, ascending, ``stop`` exclusive.
    """

    group: RowGroup
    pieces: tuple[tuple[int, int], ...]

    @property
    def rows(self) -> int:
        """How many rows are taken."""
        return sum(stop - start for start, stop in self.pieces)


@dataclass(frozen=True)
class Manifest:
    """What a materialized dataset holds; its presence says that the dataset is whole.

    Parameters
    ----------
    columns
        The stored columns, with every size resolved.
    splits
        Row groups by split, ``"train"`` and ``"val"``, in the DataFrame's partition order.
    sizes
        Bytes of each file, where they are known.
    summary
        What tells the rows from others, as far as it is known; see :mod:`hvdspark.data.summary`.
    """

    columns: tuple[ColumnSpec, ...]
    splits: Mapping[str, tuple[RowGroup, ...]]
    sizes: Mapping[str, int] = field(default_factory=dict)
    summary: Mapping[str, float] = field(default_factory=dict)

    VERSION = 1

    def rows(self, split: str) -> int:
        """Count the rows of a split."""
        return sum(group.rows for group in self.splits.get(split, ()))

    def to_json(self) -> str:
        """Write the manifest as JSON text."""
        return json.dumps({"version": self.VERSION, **asdict(self)}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read what :meth:`to_json` wrote; raises ``ValueError`` for another version."""
        data = json.loads(text)
        if data["version"] != cls.VERSION:
            raise ValueError(f"manifest version {data['version']}, this hvdspark reads {cls.VERSION}")
        return cls(
            columns=tuple(_column(**values) for values in data["columns"]),
            splits={name: tuple(RowGroup(**group) for group in groups) for name, groups in data["splits"].items()},
            sizes={str(name): int(size) for name, size in data.get("sizes", {}).items()},
            summary={str(name): float(value) for name, value in data.get("summary", {}).items()},
        )


def _column(shape: list[int] | None = None, fed_as: Sequence[str] = (), **values: Any) -> ColumnSpec:
    """Read a column from JSON, which has lists for tuples."""
    return ColumnSpec(**values, shape=None if shape is None else tuple(shape), fed_as=tuple(fed_as))


@dataclass(frozen=True)
class ShardPlan:
    """Which rows go to which rank in which step; decided once, for all ranks.

    Every step but the last has ``batch_rows`` rows on every rank; the rows that remain are spread evenly
    over the ranks in the last step. So all ranks take the same number of steps, shards differ by at most one
    row, and a step holds as many rows as one process with the whole batch would have had in it. With ``shares``,
    which rows are whose is given; ranks then may have fewer rows in some of the last steps, or none.

    Parameters
    ----------
    groups
        The row groups of the split, in reading order.
    size
        Number of ranks.
    batch_rows
        Rows per rank and full step.
    striped
        ``True``: the ranks share each step's consecutive rows, so that the order over all ranks is that of
        the data. ``False``: each rank has one consecutive piece of the data, read once by nobody else.
    shares
        Rows of each rank, where they lie with the ranks already; ``None`` shares them evenly.
    lots
        Number of the share that each rank has, where another fit may give it another; ``None`` where it is the rank's.
    """

    groups: tuple[RowGroup, ...]
    size: int
    batch_rows: int
    striped: bool = False
    shares: tuple[int, ...] | None = None
    lots: tuple[int, ...] | None = None

    @cached_property
    def rows(self) -> int:
        """Rows of all ranks together."""
        return sum(group.rows for group in self.groups)

    @cached_property
    def steps(self) -> int:
        """Steps of one pass over the rows, the same on every rank."""
        if self.shares is not None:
            return -(-max(self.shares) // self.batch_rows)
        return -(-self.rows // (self.batch_rows * self.size))

    def rows_at(self, rank: int, step: int) -> int:
        """Count the rows that a rank has in a step."""
        if self.shares is not None:
            return min(max(self.shares[rank] - step * self.batch_rows, 0), self.batch_rows)
        if step < self.steps - 1:
            return self.batch_rows
        share, extra = divmod(self.total_rows_at(step), self.size)
        return share + (rank < extra)

    def total_rows_at(self, step: int) -> int:
        """Count the rows of all ranks together in a step."""
        if self.shares is not None:
            return sum(self.rows_at(rank, step) for rank in range(self.size))
        full = self.batch_rows * self.size
        return full if step < self.steps - 1 else self.rows - full * (self.steps - 1)

    def rows_of(self, rank: int) -> int:
        """Count the rows that a rank has in one pass."""
        if self.shares is not None:
            return self.shares[rank]
        return self.batch_rows * (self.steps - 1) + self.rows_at(rank, self.steps - 1)

    def lot_of(self, rank: int) -> int:
        """Return the number of the share that a rank has: what is random with its rows goes by that."""
        return rank if self.lots is None else self.lots[rank]

    def own_steps(self, rank: int) -> int:
        """Count the steps of a pass in which a rank has rows; they are the first ones."""
        return -(-self.rows_of(rank) // self.batch_rows)

    @property
    def has_idle_steps(self) -> bool:
        """Whether some rank has no row of its own in some step."""
        return any(self.own_steps(rank) < self.steps for rank in range(self.size))


@dataclass(frozen=True)
class RankContext:
    """Where a training process stands among its peers.

    Parameters
    ----------
    rank, size
        Global rank and number of ranks.
    local_rank, local_size
        The same among the ranks of one host.
    cross_rank, cross_size
        The host's number among the hosts that have this local rank, and how many they are.
    host
        Name of the host, as Spark knows it.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int
    host: str

    def __str__(self) -> str:
        return f"rank {self.rank}/{self.size} {self.host}"


@dataclass(frozen=True)
class StoreRef:
    """Address of a Store and of what is needed to open it elsewhere."""

    url: str
    storage_options: Mapping[str, Any] = field(default_factory=dict, repr=False)
    private: bool = True


@dataclass(frozen=True)
class FitPlan:
    """Everything a rank needs to know to train, besides the model.

    Parameters
    ----------
    run_id
        Name of the run; its folder in the Store.
    store
        Where checkpoints and the model go.
    dataset
        Folder of the rows, relative to the Store that they are in; empty where they lie in its top folder.
    columns
        The stored columns.
    batch
        How columns make up a batch.
    train, val
        The shards of both splits; ``val`` is ``None`` without validation.
    epochs
        Passes over the training rows (or over ``train_steps_per_epoch`` steps).
    shuffle, seed
        Whether rows are shuffled, and the seed of everything random.
    reader_workers
        Threads of a rank that read.
    cache
        Where decoded rows are kept for later epochs.
    data
        The Store that the rows are in, where that is another one.
    summary
        What tells the rows from others, as for :class:`Manifest`.
    """

    run_id: str
    store: StoreRef
    dataset: str
    columns: tuple[ColumnSpec, ...]
    batch: BatchSpec
    train: ShardPlan
    val: ShardPlan | None
    epochs: int
    shuffle: bool
    seed: int
    reader_workers: int = 2
    cache: CacheMode = "auto"
    train_steps_per_epoch: int | None = None
    validation_steps_per_epoch: int | None = None
    data: StoreRef | None = None
    summary: Mapping[str, float] = field(default_factory=dict)

    @property
    def steps_per_epoch(self) -> int:
        """Training steps of an epoch, which all ranks take together."""
        return self.train_steps_per_epoch or self.train.steps


@dataclass(frozen=True)
class TrainResult:
    """What comes back from rank 0: small values and paths, never weights.

    Parameters
    ----------
    history
        Per metric the value of each epoch.
    model_path
        The published model file, relative to the Store.
    phases
        Seconds spent in the rank, by phase.
    rows_per_s
        Training rows per second over all ranks, first epoch excluded where there are more.
    data_wait_share
        Of the time of those epochs' training steps, the share that they waited for rows, from 0 to 1, in the rank that
        waited longest.
    inputs, outputs
        What the trained model takes and gives.
    epochs
        The records of the epochs, as :meth:`hvdspark.history.EpochRecord.to_plain` gives them.
    """

    history: Mapping[str, list[float]]
    model_path: str
    phases: Mapping[str, float]
    rows_per_s: float
    data_wait_share: float
    inputs: tuple[ModelTensor, ...]
    outputs: tuple[ModelTensor, ...]
    epochs: tuple[Mapping[str, Any], ...] = ()
