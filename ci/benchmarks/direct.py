"""Seconds of a fit whose rows go to the ranks directly, beside the way through Parquet."""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hvdspark.estimators import KerasEstimator

from benchmarks import data
from benchmarks.comparison import Comparison, SkippedError, interleaved, seconds
from benchmarks.estimator import make_estimator
from benchmarks.session import CLUSTER, spark_session

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

ROWS = 200_000


def measure(*, quick: bool) -> Iterator[Comparison]:
    """Fit one epoch on rows that were never seen before, both ways in turns."""
    if not KerasEstimator().hasParam("data"):
        raise SkippedError("this version has no parameter 'data'")
    with tempfile.TemporaryDirectory() as name, spark_session(CLUSTER) as spark:
        # Other rows each time: those of an earlier fit may be in the Store already.
        seeds = itertools.count()
        direct, parquet = (partial(_fit, spark, Path(name), seeds, way) for way in ("direct", "petastorm"))
        interleaved(1, direct, parquet)
        ours, theirs = interleaved(1 if quick else 3, direct, parquet)
    yield Comparison('fit, 1 epoch, data="direct" vs through Parquet', "s", ours, theirs)


def _fit(spark: SparkSession, folder: Path, seeds: Iterator[int], way: str) -> float:
    seed = next(seeds)
    df = spark.read.parquet(str(data.write_labelled(folder / f"rows-{seed}", ROWS, seed)))
    estimator = make_estimator(folder / "store", data=way)
    return seconds(lambda: estimator.fit(df))
