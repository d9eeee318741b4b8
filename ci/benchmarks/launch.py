"""Seconds that it takes to start ranks which meet, add a number up over all, and end; and what each rank adds."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import hvdspark
from benchmarks.comparison import Comparison, interleaved, seconds
from benchmarks.session import spark_session

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

SIZES = (2, 4, 8, 16)


def work() -> float:
    """Meet all others once."""
    import horovod.tensorflow as hvd
    import tensorflow as tf

    hvd.init()
    return float(hvd.allreduce(tf.constant(1.0), op=hvd.Sum))


def measure(*, quick: bool) -> Iterator[Comparison]:
    """Start more and more ranks, from a pool that is warm, in turns with a single one."""
    with spark_session(f"local[{SIZES[-1]}]") as spark:
        for controller in ("gloo", "mpi"):
            one = partial(_start, spark, controller, 1)
            for size in SIZES:
                many = partial(_start, spark, controller, size)
                many(), one()
                ours, theirs = interleaved(1 if quick else 3, many, one)
                added_s = (statistics.median(ours) - statistics.median(theirs)) / (size - 1)
                note = f"{added_s:.2f} s for each rank more"
                yield Comparison(f"launch, {size} ranks vs 1 ({controller})", "s", ours, theirs, note=note)


def _start(spark: SparkSession, controller: str, size: int) -> float:
    """Return the seconds of a job whose ranks do nothing else."""
    modules = ["tensorflow", "horovod.tensorflow"]
    launch = partial(hvdspark.run, work, num_proc=size, controller=controller, preload=modules, start_timeout=600)
    return seconds(partial(launch, spark=spark))
