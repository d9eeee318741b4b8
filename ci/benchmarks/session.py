"""Spark sessions. Also imported by the program that runs in the environment of horovod.spark: pyspark only."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# Two executors with a core each, in processes of their own.
CLUSTER = "local-cluster[2,1,4096]"


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


@contextmanager
def spark_session(master: str) -> Iterator[SparkSession]:
    """Start Spark and wait until its executors are there; stop it at the end of the block."""
    from pyspark.sql import SparkSession

    spark = (
        SparkSession.builder.master(master)
        .appName("hvdspark-bench")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.driver.memory", "4g")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.local.dir", tempfile.gettempdir())
        .config("spark.sql.shuffle.partitions", "4")
        .getOrCreate()
    )
    spark.sparkContext.setLogLevel("ERROR")
    try:
        # A Python worker on every slot would warm up what a fit has to start itself: a job of the JVM alone.
        spark.range(1000).selectExpr("sum(id)").collect()
        yield spark
    finally:
        spark.stop()
