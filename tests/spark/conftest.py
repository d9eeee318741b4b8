"""One Spark session of this process, ``local[2]``: real tasks and Python workers, no cluster."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

from hvdspark import Store


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    """Two task slots, no user interface, nothing that listens beyond the loopback."""
    os.environ["PYSPARK_PYTHON"] = sys.executable
    os.environ["SPARK_LOCAL_IP"] = "127.0.0.1"
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    session = (
        SparkSession.builder.master("local[2]")
        .appName("hvdspark-spark")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.sql.shuffle.partitions", "2")
        .config("spark.sql.session.timeZone", "UTC")
        .getOrCreate()
    )
    session.sparkContext.setLogLevel("OFF")
    yield session
    session.stop()


@pytest.fixture
def jobs_of(spark: SparkSession) -> Iterator[Callable[[], int]]:
    """Return a function that counts the Spark jobs of the test so far."""
    context = spark.sparkContext
    group = f"test-{os.urandom(8).hex()}"
    context.setJobGroup(group, "a test")
    yield lambda: len(context.statusTracker().getJobIdsForGroup(group))
    context.setLocalProperty("spark.jobGroup.id", "")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store")
