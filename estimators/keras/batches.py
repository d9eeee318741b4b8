"""A rank's rows as chunks of several steps, made ready by a ``tf.data`` pipeline, and the batches in them."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdspark.data.arrays import fill_tensor
from hvdspark.data.blocks import Block, Blocks, holds_all, stack
from hvdspark.data.reader import read_group
from hvdspark.data.shardcache import CacheRoom
from hvdspark.data.shards import filler_read, reads_of
from hvdspark.data.source import BlockSource
from hvdspark.plan import BatchSpec, ColumnSpec, FitPlan, ShardPlan, TensorSpec
from hvdspark.store import Store

# Rows come in chunks of whole batches: so large that what it costs to hand one over vanishes, and small enough to stay
# in the processor's cache.
CHUNK_BYTES = 4 << 20

# Chunks made ready ahead of the steps that run; fewer where they are large, but one in any case.
PREFETCH = 4
PREFETCH_BYTES = 256 << 20

# More passes than any training takes.
ENDLESS = 1 << 40


@dataclass(frozen=True)
class StepFacts:
    """What the gradients of each step of a pass stand for, as arrays of shape ``(steps,)``.

    Parameters
    ----------
    rows
        Rows of this rank, ``float32``; zero where it has none and computes on a filler.
    total
        Rows of all ranks together, ``float32``.
    apply
        Whether the weights change with the step, ``bool``, or its gradients are kept for a later one.
    """

    rows: np.ndarray
    total: np.ndarray
    apply: np.ndarray

    def of(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the facts of the steps from ``first`` to before ``stop``, counted from the first pass on."""
        steps = np.arange(first, stop) % len(self.rows)
        return self.rows[steps], self.total[steps], self.apply[steps]


class Batches:
    """The batches of one split for one rank.

    Parameters
    ----------
    plan
        The fit.
    shards
        The split's shards.
    rank
        Whose share this is.
    shuffle
        Whether to shuffle the rows of a pass.
    workers
        Threads that read.
    passes
        How often the rows will come; those that come once are not cached.
    room
        What the cache may take.
    """

    def __init__(
        self,
        plan: FitPlan,
        shards: ShardPlan,
        rank: int,
        *,
        shuffle: bool,
        workers: int,
        passes: int = 1,
        room: CacheRoom | None = None,
    ) -> None:
        self._plan = plan
        self._shards = shards
        self._rank = rank
        names = set(plan.batch.columns)
        self._needed = tuple(spec for spec in plan.columns if spec.name in names)
        self._specs = {spec.name: spec for spec in self._needed}
        self._store = Store.from_ref(plan.data or plan.store)
        self._stacks, self._stored = _as_stored(plan.batch, self._specs)
        self._source = BlockSource(
            self._store,
            plan.dataset,
            self._needed,
            reads_of(shards, rank) if shards.rows_of(rank) else [],
            shuffle=shuffle,
            seed=(plan.seed, shards.lot_of(rank)),
            workers=workers,
            stacks=self._stacks,
            cache=plan.cache if passes > 1 else "none",
            room=room,
        )
        self.error: Exception | None = None
        """What reading failed with; TensorFlow makes another error of it."""
        self._dtypes = [spec.dtype for spec in _signature(plan.batch, self._specs)]
        self.signature = _signature(self._stored, self._specs)
        """What a chunk holds: flat tensors whose first dimension is the rows, in the dtypes of the columns."""
        batch_bytes = _batch_bytes(self.signature, shards.batch_rows)
        self._chunk_rows = shards.batch_rows * max(1, CHUNK_BYTES // batch_bytes)
        self._prefetch = max(1, min(PREFETCH, PREFETCH_BYTES // max(CHUNK_BYTES, batch_bytes)))

    @property
    def own_steps(self) -> int:
        """Steps of a pass in which this rank has rows."""
        return self._shards.own_steps(self._rank)

    def facts(self, passes_per_step: int) -> StepFacts:
        """Say what the gradients of the steps of a pass stand for.

        Parameters
        ----------
        passes_per_step
            Steps whose gradients go into one update; a pass ends with an update in any case.
        """
        shards, steps = self._shards, range(self._shards.steps)
        return StepFacts(
            rows=np.array([shards.rows_at(self._rank, step) for step in steps], dtype=np.float32),
            total=np.array([shards.total_rows_at(step) for step in steps], dtype=np.float32),
            apply=np.array([step == steps[-1] or (step + 1) % passes_per_step == 0 for step in steps]),
        )

    def chunks(self, passes: int, *, fill: bool, first: int = 0) -> tf.data.Dataset:
        """Return the rows as chunks of whole batches; only the last batch of a pass is smaller.

        Parameters
        ----------
        passes
            How often the rows come.
        fill
            Whether a chunk of one row stands for each step in which this rank has none.
        first
            The step to begin with, counted from the first pass on; those before it have been taken earlier.
        """
        idle = self._shards.steps - self.own_steps if fill else 0
        filler = (self._filler(),) * idle if idle else ()
        found = tf.data.Dataset.from_generator(
            lambda: self._chunks(passes, filler, first), output_signature=self.signature
        )
        options = tf.data.Options()
        # There is nothing to tune, and the thread that would do it sleeps ever longer, up to a minute, while the
        # iterator's end waits for it.
        options.autotune.enabled = False
        return found.prefetch(self._prefetch).with_options(options)

    def steps_in(self, chunk: Sequence[tf.Tensor]) -> int:
        """Return the number of batches in a chunk."""
        return -(-int(chunk[0].shape[0]) // self._shards.batch_rows)

    def batch(self, chunk: Sequence[tf.Tensor], step: tf.Tensor) -> tuple[tf.Tensor, ...]:
        """Cut one of a chunk's batches out of it, as flat tensors in the dtypes that the model takes.

        Works within a compiled function, where ``step`` may be a tensor.
        """
        rows = self._shards.batch_rows
        cut = [tensor[step * rows : (step + 1) * rows] for tensor in chunk]
        return tuple(tf.cast(tensor, dtype) for tensor, dtype in zip(cut, self._dtypes, strict=True))

    def sample(self) -> tuple[Block, ...]:
        """Read one row as flat tensors, to build a model that knows its shapes only then."""
        return _tensors(self._one_row(), self._plan.batch)

    def _chunks(self, passes: int, filler: Sequence[tuple[Block, ...]], first: int) -> Iterator[tuple[Block, ...]]:
        """Yield the rank's rows, pass after pass, and the filler at the end of each."""
        number, skipped = divmod(first, self._shards.steps)
        try:
            for blocks in self._source.passes(range(number, passes), self._chunk_rows):
                chunks = itertools.chain((_tensors(item, self._stored) for item in blocks), filler)
                yield from _without(chunks, skipped, self._shards.batch_rows)
                skipped = 0
        except Exception as exc:
            self.error = exc
            raise

    def _filler(self) -> tuple[Block, ...]:
        return _tensors(stack(self._one_row(), self._stacks), self._stored)

    def _one_row(self) -> Blocks:
        return read_group(self._store, self._plan.dataset, self._needed, filler_read(self._shards, self._rank))


def _without(chunks: Iterable[tuple[Block, ...]], steps: int, batch_rows: int) -> Iterator[tuple[Block, ...]]:
    """Leave out the first steps."""
    for chunk in chunks:
        held = -(-len(chunk[0]) // batch_rows)
        if steps < held:
            yield tuple(tensor[steps * batch_rows :] for tensor in chunk) if steps else chunk
        steps = max(0, steps - held)


def _tensors(blocks: Blocks, batch: BatchSpec) -> tuple[Block, ...]:
    tensors = [fill_tensor(blocks, tensor) for tensor in (*batch.features, *batch.labels)]
    if batch.sample_weight is not None:
        tensors.append(fill_tensor(blocks, TensorSpec((batch.sample_weight,), (), "float32")))
    return tuple(tensors)


def tensor_dtype(tensor: TensorSpec, specs: dict[str, ColumnSpec]) -> tf.DType:
    """Return the dtype of a tensor: the one it asks for, else the one that holds all its columns."""
    if tensor.dtype is not None:
        return tf.as_dtype(tensor.dtype)
    return tf.as_dtype(np.result_type(*(np.dtype(specs[name].dtype) for name in tensor.columns)))


def _as_stored(batch: BatchSpec, specs: dict[str, ColumnSpec]) -> tuple[dict[str, tuple[str, ...]], BatchSpec]:
    """Describe the batches as Python hands them over, with less work for it.

    Returns
    -------
    stacks : dict of str to tuple of str
        Columns that are put side by side before they are shuffled.
    batch : BatchSpec
        The tensors made of those, in the dtype of the columns where that only needs to be widened: that is for
        TensorFlow to do, after the rows were copied.
    """
    uses = Counter(name for tensor in (*batch.features, *batch.labels) for name in tensor.columns)
    stacks: dict[str, tuple[str, ...]] = {}

    def stored(tensor: TensorSpec) -> TensorSpec:
        columns = [specs[name] for name in tensor.columns]
        dtype = _stored_dtype(tensor, specs)
        name = ", ".join(tensor.columns)
        alike = len({spec.dtype for spec in columns}) == 1 and all(spec.kind == "scalar" for spec in columns)
        if len(columns) > 1 and alike and name not in specs and all(uses[spec.name] == 1 for spec in columns):
            stacks[name] = tensor.columns
            return dataclasses.replace(tensor, columns=(name,), dtype=dtype)
        return dataclasses.replace(tensor, dtype=dtype)

    if batch.sample_weight is not None:
        uses[batch.sample_weight] += 1
    features, labels = (tuple(map(stored, tensors)) for tensors in (batch.features, batch.labels))
    return stacks, dataclasses.replace(batch, features=features, labels=labels)


def _stored_dtype(tensor: TensorSpec, specs: dict[str, ColumnSpec]) -> str | None:
    """Return the columns' own dtype where the tensor's can hold all of its values, else the tensor's."""
    if tensor.dtype == "string" or "string" in {specs[name].dtype for name in tensor.columns}:
        return tensor.dtype
    own = tensor_dtype(dataclasses.replace(tensor, dtype=None), specs)
    widens = holds_all(tensor_dtype(tensor, specs).as_numpy_dtype, own.as_numpy_dtype)
    return str(own.name) if widens else tensor.dtype


def packer(model: keras.Model, batch: BatchSpec) -> Callable[..., Any]:
    """Return a function from flat tensors to the ``(x, y[, sample_weight])`` that the model takes."""
    inputs, outputs = len(batch.features), len(batch.labels)

    def pack(*flat: Any) -> Any:
        x = _shaped_like(getattr(model, "input", None), flat[:inputs])
        y = _shaped_like(getattr(model, "output", None), flat[inputs : inputs + outputs])
        return (x, y) if batch.sample_weight is None else (x, y, flat[-1])

    return pack


def _shaped_like(structure: Any, flat: tuple[Any, ...]) -> Any:
    """Put tensors into the model's own structure (a dictionary, say); a single one stands alone."""
    if structure is not None and not hasattr(structure, "shape"):
        # tf.data takes a list for one tensor to be stacked, a tuple for several; Keras takes both for several.
        return keras.tree.lists_to_tuples(keras.tree.pack_sequence_as(structure, list(flat)))
    return flat[0] if len(flat) == 1 else flat


def _signature(batch: BatchSpec, specs: dict[str, ColumnSpec]) -> tuple[tf.TensorSpec, ...]:
    found = []
    for tensor in (*batch.features, *batch.labels):
        assert tensor.shape is not None, "shapes are resolved before the ranks start"
        found.append(tf.TensorSpec((None, *tensor.shape), tensor_dtype(tensor, specs)))
    if batch.sample_weight is not None:
        found.append(tf.TensorSpec((None,), tf.float32))
    return tuple(found)


def _batch_bytes(structure: Sequence[tf.TensorSpec], batch_rows: int) -> int:
    row_bytes: int = sum(math.prod(spec.shape[1:]) * spec.dtype.size for spec in structure)
    return max(1, row_bytes * batch_rows)
