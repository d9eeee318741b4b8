"""How gradients are averaged over the ranks: by Horovod, or in memory that the ranks of one host share.

Horovod takes about 3 ms for a collective on a CPU, whatever its size, of which most is coordination; a small model
computes a whole step in less. In shared memory the same average takes a tenth of that.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from hvdspark.errors import ParamError
from hvdspark.worker.session import Session
from hvdspark.worker.shared_region import is_supported
from hvdspark.worker.shared_sum import CHUNK_BYTES, SharedSum

logger = logging.getLogger(__name__)

# A sparse gradient of a table with fewer values than this travels dense: one fused allreduce is cheaper than the two
# gathers that Horovod makes of a sparse one.
DENSE_TABLE_VALUES = 4 << 20

# Up to this size Horovod takes longer to come to an agreement than shared memory takes for all of it, so that a trial,
# which takes a tenth of a second, could only confirm it.
SMALL_BYTES = 1 << 20
_TRIALS = 9

# Traced as it is: AutoGraph would translate the source first, which takes seconds.
_plain = tf.autograph.experimental.do_not_convert


class Allreduce(Protocol):
    """Averages gradients over the ranks, inside of a compiled function."""

    size: int
    """Number of ranks."""

    @property
    def seconds(self) -> float:
        """How long averaging took so far: from when the gradients were there to when the averages were.

        Most of it is the time in which this rank waited for slower ones.
        """

    def average(self, grads: Sequence[Any], name: str) -> list[Any]:
        """Return the averages.

        Parameters
        ----------
        grads
            Tensors or ``tf.IndexedSlices``, of the same shapes and dtypes on every rank.
        name
            Name of the collective, the same on every rank, and another one for each call in a step.
        """


class HorovodAllreduce:
    """Averages by one grouped ring allreduce; sparse gradients one by one.

    Parameters
    ----------
    hvd
        Horovod's TensorFlow module, initialized.
    compression
        ``"fp16"`` sends half-precision numbers, ``"none"`` the gradients as they are.
    """

    def __init__(self, hvd: Any, compression: str = "none") -> None:
        self.size = int(hvd.size())
        self._hvd = hvd
        self._settings = {"op": hvd.Average, "compression": getattr(hvd.Compression, compression)}
        with tf.device("CPU:0"):
            self._seconds = tf.Variable(0.0, trainable=False, dtype=tf.float64)

    @property
    def seconds(self) -> float:
        """How long averaging took so far; see :class:`Allreduce`."""
        return float(self._seconds.numpy())

    @_plain  # type: ignore[untyped-decorator]
    def average(self, grads: Sequence[Any], name: str) -> list[Any]:
        """Return the averages; see :class:`Allreduce`."""
        if self.size == 1:
            return list(grads)
        # Horovod's operations run in threads of its own, inside of a graph: only the graph can tell their time.
        began = _time_after(grads)
        with tf.control_dependencies([began]):
            averaged = self._average(grads, name)
        with tf.device("CPU:0"):
            self._seconds.assign_add(_time_after(averaged) - began)
        return averaged

    def _average(self, grads: Sequence[Any], name: str) -> list[Any]:
        averaged: list[Any] = list(grads)
        for dtype in dict.fromkeys(grad.dtype for grad in grads if not _is_sparse(grad)):
            # A grouped call takes one dtype, and of the short ones float16 alone.
            chosen = [i for i, grad in enumerate(grads) if not _is_sparse(grad) and grad.dtype == dtype]
            sent = [tf.cast(grads[i], _sent_as(dtype)) for i in chosen]
            found = self._hvd.grouped_allreduce(sent, name=f"{name}_{dtype.name}", **self._settings)
            for index, average in zip(chosen, found, strict=True):
                averaged[index] = tf.cast(average, dtype)
        # One by one, because Horovod's grouped call gives sparse gradients the shapes of others.
        for index, grad in enumerate(grads):
            if _is_sparse(grad):
                averaged[index] = self._hvd.allreduce(grad, name=f"{name}_{index}", **self._settings)
        return averaged


class SharedMemoryAllreduce:
    """Averages in memory that the ranks of one host share, at full precision; sparse gradients go through Horovod.

    Parameters
    ----------
    shared
        The sum over the ranks.
    horovod
        For sparse gradients.
    """

    def __init__(self, shared: SharedSum, horovod: HorovodAllreduce) -> None:
        self.size = horovod.size
        self._shared = shared
        self._horovod = horovod
        # What TensorFlow orders are uses of a variable; calls of Python functions it may run at the same time.
        self._calls = tf.Variable(0, trainable=False, dtype=tf.int64)
        self._seconds = 0.0

    @property
    def seconds(self) -> float:
        """How long averaging took so far; see :class:`Allreduce`."""
        return self._seconds + self._horovod.seconds

    @_plain  # type: ignore[untyped-decorator]
    def average(self, grads: Sequence[Any], name: str) -> list[Any]:
        """Return the averages; see :class:`Allreduce`."""
        dense = [grad for grad in grads if not _is_sparse(grad)]
        sparse = [grad for grad in grads if _is_sparse(grad)]
        averaged, gathered = iter(self._average(dense)), iter(self._horovod.average(sparse, name) if sparse else [])
        return [next(gathered) if _is_sparse(grad) else next(averaged) for grad in grads]

    def _average(self, grads: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        if not grads:
            return []
        with tf.control_dependencies([self._calls.read_value()]):
            found = tf.numpy_function(self._add, list(grads), [grad.dtype for grad in grads])
        with tf.control_dependencies(found):
            self._calls.assign_add(1)
        return [tf.ensure_shape(average, grad.shape) for average, grad in zip(found, grads, strict=True)]

    def _add(self, *grads: np.ndarray[Any, Any]) -> list[np.ndarray[Any, Any]]:
        began = time.perf_counter()
        averages = self._shared.add(grads, 1 / self.size)
        self._seconds += time.perf_counter() - began
        return averages


def choose_allreduce(kind: str, session: Session, variables: Sequence[Any], compression: str) -> Allreduce:
    """Return what is to average the gradients; all ranks come to the same choice.

    Parameters
    ----------
    kind
        ``"horovod"``; ``"shared_memory"``; or ``"auto"`` for the faster of both: shared memory where gradients are
        small, else what a trial on gradients of the model's size finds.
    session
        The Horovod session. Where the choice is shared memory, it uses that as well.
    variables
        The model's trainable variables.
    compression
        See :class:`HorovodAllreduce`.

    Raises
    ------
    ParamError
        When ``"shared_memory"`` is asked for and cannot be.
    """
    horovod = HorovodAllreduce(session.hvd, compression)
    if session.context.size == 1 or kind == "horovod":
        return horovod
    hindrance = _hindrance(session)
    if hindrance is None and kind == "auto" and _may_be_sparse(variables):
        hindrance = "a table of the model is so large that its gradients stay sparse"
    if hindrance is None:
        size_bytes = sum(math.prod(variable.shape) * tf.as_dtype(variable.dtype).size for variable in variables)
        try:
            shared = session.open_shared_sum(min(max(2 * size_bytes, 1 << 16), CHUNK_BYTES))
        except OSError as exc:
            hindrance = str(exc)
    if hindrance is not None:
        if kind == "shared_memory":
            raise ParamError(f"allreduce='shared_memory' cannot be: {hindrance}", param="allreduce")
        logger.info("gradients are averaged by Horovod: %s", hindrance)
        return horovod
    in_memory = SharedMemoryAllreduce(shared, horovod)
    is_open = kind == "auto" and size_bytes > SMALL_BYTES
    if is_open and not _is_faster(in_memory, horovod, session, variables):
        shared.close()
        return horovod
    if not is_open:
        logger.info("gradients are averaged in memory that the ranks of the host share")
    session.rely_on(shared)
    return in_memory


def _hindrance(session: Session) -> str | None:
    """Say why the ranks cannot share memory, if so."""
    if session.context.local_size != session.context.size:
        return "the ranks are on several hosts"
    if tf.config.get_visible_devices("GPU"):
        return "the gradients are on GPUs"
    return None if is_supported() else "it takes Linux on x86-64"


def _may_be_sparse(variables: Sequence[Any]) -> bool:
    # Keras calls the table of an Embedding so.
    return any(v.name == "embeddings" and math.prod(v.shape) > DENSE_TABLE_VALUES for v in variables)


def _is_faster(in_memory: Allreduce, horovod: Allreduce, session: Session, variables: Sequence[Any]) -> bool:
    """Try both; every rank gets the same answer."""
    seconds = np.array([_time(allreduce, variables) for allreduce in (in_memory, horovod)])
    memory_ms, horovod_ms = session.sum(seconds, "hvdspark_trial_times") / session.context.size * 1e3
    chosen = "shared memory" if memory_ms < horovod_ms else "Horovod"
    if session.is_first:
        logger.info(
            "gradients are averaged by %s: of this model in %.2f ms in shared memory, %.2f ms by Horovod",
            chosen,
            memory_ms,
            horovod_ms,
        )
    return bool(memory_ms < horovod_ms)


def _time(allreduce: Allreduce, variables: Sequence[Any]) -> float:
    """Return the seconds that one average takes."""
    average = tf.function(lambda *grads: allreduce.average(grads, "hvdspark_trial"), jit_compile=False, autograph=False)
    grads = [tf.zeros(variable.shape, variable.dtype) for variable in variables]
    times = []
    for _ in range(_TRIALS):
        start = time.perf_counter()
        average(*grads)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _sent_as(dtype: tf.DType) -> tf.DType:
    return tf.float32 if dtype == tf.bfloat16 else dtype


def _time_after(tensors: Sequence[Any]) -> tf.Tensor:
    """Return the time, in seconds, at which all tensors are there; on a GPU, at which they are on its way."""
    parts = tf.nest.flatten(list(tensors), expand_composites=True)  # sparse ones are their values and indices
    with tf.device("CPU:0"), tf.control_dependencies(parts):
        return tf.timestamp()


def _is_sparse(grad: Any) -> bool:
    return isinstance(grad, tf.IndexedSlices)
