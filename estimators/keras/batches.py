"""A rank's blocks as a ``tf.data`` pipeline of training and validation steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from hvdspark.data.arrays import fill_tensor
from hvdspark.data.blocks import Block, Blocks, late_slices
from hvdspark.data.reader import BlockSource, read_group
from hvdspark.data.shards import filler_read, reads_of
from hvdspark.plan import BatchSpec, ColumnSpec, FitPlan, ShardPlan, TensorSpec
from hvdspark.store import Store

# Batches made ready ahead of the step that runs; fewer where they are large, but one in any case.
PREFETCH = 8
PREFETCH_BYTES = 256 << 20

# More passes than any training takes.
ENDLESS = 1 << 40


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
    """

    def __init__(self, plan: FitPlan, shards: ShardPlan, rank: int, *, shuffle: bool, workers: int) -> None:
        self._plan = plan
        self._shards = shards
        self._rank = rank
        self._needed = tuple(spec for spec in plan.columns if spec.name in plan.batch.columns)
        self._specs = {spec.name: spec for spec in self._needed}
        self._store = Store.from_ref(plan.data or plan.store)
        self._source = BlockSource(
            self._store,
            plan.dataset,
            self._needed,
            reads_of(shards, rank) if shards.rows_of(rank) else [],
            shuffle=shuffle,
            seed=(plan.seed, rank),
            workers=workers,
            cache_in_memory=plan.cache_in_memory,
        )
        self._structure = _signature(plan.batch, self._specs)
        self._prefetch = prefetch_of(self._structure, shards.batch_rows)

    @property
    def own_steps(self) -> int:
        """Steps of a pass in which this rank has rows."""
        return self._shards.steps - (self._shards.rows_at(self._rank, self._shards.steps - 1) == 0)

    def data(self, pack: Callable[..., Any], passes: int) -> tf.data.Dataset:
        """Return ``(x, y[, sample_weight])`` of every step in which this rank has rows.

        Parameters
        ----------
        pack
            Makes Keras' structure of the flat tensors; see :func:`packer`.
        passes
            How often the rows come.
        """
        dataset = tf.data.Dataset.range(passes).flat_map(lambda number: self._pass(number))
        return dataset.map(pack, num_parallel_calls=1, deterministic=True).prefetch(self._prefetch)

    def steps(self, pack: Callable[..., Any], passes: int, passes_per_step: int) -> tf.data.Dataset:
        """Return ``(data, rows, total, apply)`` of every step: what :class:`StepRows` wants to know with it.

        Parameters
        ----------
        pack, passes
            As for :meth:`data`.
        passes_per_step
            Steps whose gradients go into one update; a pass ends with an update in any case.
        """
        shards, rank = self._shards, self._rank
        last = shards.steps - 1
        is_idle = shards.rows_at(rank, last) == 0
        filler = tf.data.Dataset.from_tensors(self._filler()) if is_idle else None

        def one_pass(number: tf.Tensor) -> tf.data.Dataset:
            batches = self._pass(number)
            if filler is not None:
                batches = batches.concatenate(filler)
            index = tf.data.Dataset.range(shards.steps)
            rows = index.map(lambda step: tf.where(step < last, shards.batch_rows, shards.rows_at(rank, last)))
            total = index.map(lambda step: tf.where(step < last, shards.total_rows_at(0), shards.total_rows_at(last)))
            apply = index.map(lambda step: (step == last) | ((step + 1) % passes_per_step == 0))
            return tf.data.Dataset.zip((batches, rows, total, apply))

        def packed(flat: Any, rows: Any, total: Any, apply: Any) -> Any:
            return pack(*flat), tf.cast(rows, tf.float32), tf.cast(total, tf.float32), apply

        dataset = tf.data.Dataset.range(passes).flat_map(one_pass)
        return dataset.map(packed, num_parallel_calls=1, deterministic=True).prefetch(self._prefetch)

    def sample(self) -> tuple[Block, ...]:
        """Read one row as flat tensors, to build a model that knows its shapes only then."""
        return self._filler()

    def _pass(self, number: tf.Tensor) -> tf.data.Dataset:
        """Batches of one pass; a pass never shares a batch with the next."""
        blocks = tf.data.Dataset.from_generator(self._generate, args=(number,), output_signature=self._structure)
        return blocks.rebatch(self._shards.batch_rows)

    def _generate(self, number: Any) -> Iterator[tuple[Block, ...]]:
        for blocks in self._source.passes(int(number)):
            for rows in late_slices(blocks):
                yield self._tensors({name: block[rows] for name, block in blocks.items()})

    def _filler(self) -> tuple[Block, ...]:
        read = filler_read(self._shards)
        return self._tensors(read_group(self._store, self._plan.dataset, self._needed, read))

    def _tensors(self, blocks: Blocks) -> tuple[Block, ...]:
        batch = self._plan.batch
        tensors = [fill_tensor(blocks, tensor) for tensor in (*batch.features, *batch.labels)]
        if batch.sample_weight is not None:
            tensors.append(fill_tensor(blocks, TensorSpec((batch.sample_weight,), (), "float32")))
        return tuple(tensors)


def prefetch_of(structure: tuple[tf.TensorSpec, ...], batch_rows: int) -> int:
    """Return how many batches are made ready ahead."""
    row_bytes: int = sum(math.prod(spec.shape[1:]) * spec.dtype.size for spec in structure)
    return max(1, min(PREFETCH, PREFETCH_BYTES // max(1, row_bytes * batch_rows)))


def tensor_dtype(tensor: TensorSpec, specs: dict[str, ColumnSpec]) -> tf.DType:
    """Return the dtype of a tensor: the one it asks for, else the one that holds all its columns."""
    if tensor.dtype is not None:
        return tf.as_dtype(tensor.dtype)
    return tf.as_dtype(np.result_type(*(np.dtype(specs[name].dtype) for name in tensor.columns)))


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
