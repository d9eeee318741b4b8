"""Archive the classes that Spark loads, so that the many short sessions of the tests start in half the time.

It is Java's class data sharing: a Java that is given the archive maps it into memory, instead of reading and checking
some ten thousand classes. It fits the jars of one environment at their place; a Java that it does not fit goes without.

``spark_classes.py ARCHIVE`` makes it, by a session that does a little of what tests do.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from horovod_recipe import BuildError

_TIMEOUT_S = 300


def exercise() -> None:
    """Have Spark load what the tests need: SQL, Parquet, Arrow to and from Python, a barrier stage, a pipeline."""
    from pyspark.ml import Pipeline
    from pyspark.ml.feature import StandardScaler, StringIndexer, VectorAssembler
    from pyspark.sql import SparkSession

    spark = (
        SparkSession.builder.master("local[2]")
        .config("spark.ui.enabled", "false")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .getOrCreate()
    )
    place = os.environ["SPARK_CLASSES_FOLDER"]
    rows = spark.range(100, numPartitions=2).selectExpr("id", "float(id) AS x", "string(id % 3) AS s", "array(id) AS a")
    rows.write.parquet(f"{place}/rows")
    rows = spark.read.parquet(f"{place}/rows")
    rows.groupBy("s").agg({"x": "avg"}).orderBy("s").collect()
    for barrier in (False, True):
        rows.mapInArrow(lambda batches: batches, rows.schema, barrier=barrier).collect()
    spark.createDataFrame([(1.0, "a")], "x double, s string").join(rows, "s", "left").count()
    stages: list[Any] = [
        StringIndexer(inputCol="s", outputCol="i"),
        VectorAssembler(inputCols=["x", "i"], outputCol="v"),
        StandardScaler(inputCol="v", outputCol="f"),
    ]
    Pipeline(stages=stages).fit(rows).write().save(f"{place}/pipeline")
    spark.stop()


def make(archive: Path) -> None:
    """Make the archive; raises :class:`BuildError` where this Java makes none."""
    # Beside its place, to be moved there whole.
    with tempfile.TemporaryDirectory(dir=archive.parent) as folder:
        fresh = Path(folder, "classes.jsa")
        options = os.environ.get("JDK_JAVA_OPTIONS", "")
        environment = {
            **os.environ,
            "JDK_JAVA_OPTIONS": f"{options} -XX:ArchiveClassesAtExit={fresh}",
            "PYSPARK_PYTHON": sys.executable,
            "SPARK_CLASSES_FOLDER": folder,
            "SPARK_LOCAL_IP": "127.0.0.1",
        }
        # Java writes the archive when the program has ended: its output ends after that.
        done = subprocess.run(
            [sys.executable, __file__], env=environment, capture_output=True, timeout=_TIMEOUT_S, check=False
        )
        if done.returncode or not fresh.exists():
            said = done.stderr.decode(errors="replace").strip().splitlines()
            raise BuildError(f"there is no archive of Spark's classes: {said[-1] if said else done.returncode}")
        fresh.replace(archive)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        exercise()
    else:
        try:
            make(Path(sys.argv[1]))
        except BuildError as exc:
            sys.exit(str(exc))
