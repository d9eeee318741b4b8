"""Executors with Open MPI in MPICH's place, beside a driver that knows nothing of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from build_cache import Cache
from clusters import INTERPRETERS
from openmpi_env import obtain_python
from pyspark.sql import SparkSession

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def openmpi_python() -> Path:
    """The interpreter of the environment with Open MPI, which ``ci/test`` has made."""
    return obtain_python(Cache.default())


@pytest.fixture(scope="session")
def as_imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder from which the checkout is imported as if it were installed."""
    package = tmp_path_factory.mktemp("path") / "hvdspark"
    package.mkdir()
    for path in [*(ROOT / "hvdspark").iterdir(), ROOT / "estimators"]:
        (package / path.name).symlink_to(path)
    return package.parent


@contextlib.contextmanager
def executors_on(spark: SparkSession, python: Path, path: Path) -> Iterator[None]:
    """Have a session's tasks run on another interpreter, with a folder on its path, for the time of a block."""
    context = spark.sparkContext
    before = context.pythonExec
    INTERPRETERS.add(str(python))
    context.pythonExec, context.environment["PYTHONPATH"] = str(python), str(path)
    try:
        yield
    finally:
        context.pythonExec = before
        del context.environment["PYTHONPATH"]
