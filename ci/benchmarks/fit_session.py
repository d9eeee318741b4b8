"""A Spark program that fits several times and transforms, and notes how long that took.

The same for hvdspark and horovod.spark; the two programs beside it differ in the estimator alone.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.session import CLUSTER, spark_session

BATCH_ROWS = 256
RANKS = 2
# What both estimators are given.
COMMON: dict[str, Any] = {
    "num_proc": RANKS,
    "loss": "binary_crossentropy",
    "feature_cols": ["features"],
    "label_cols": ["label"],
    "batch_size": BATCH_ROWS,
    "verbose": 0,
}
# What a network that learned nothing gets is 0.69.
WANTED_LOSS = 0.6


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=Path, help="Parquet folder with the columns features and label")
    parser.add_argument("results", type=Path, help="JSON file to write")
    parser.add_argument("store", help="folder for the estimator's Store")
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 1], help="epochs of each fit")
    parser.add_argument("--transform-rows", type=int, default=0, help="how many rows to transform")
    return parser.parse_args()


def run(make_estimator: Callable[..., Any]) -> None:
    """Run the program.

    Parameters
    ----------
    make_estimator
        Called with the Store's folder and ``epochs``; gives the estimator its network and what is `COMMON`.
    """
    arguments = parse_arguments()
    results: dict[str, Any] = {"fits": [], "transform_rows_per_s": None}
    with spark_session(CLUSTER) as spark:
        df = spark.read.parquet(str(arguments.rows))
        for epochs in arguments.epochs:
            estimator = make_estimator(arguments.store, epochs=epochs)
            start = time.perf_counter()
            model = estimator.fit(df)
            results["fits"].append({"epochs": epochs, "seconds": time.perf_counter() - start})
            loss = float(model.getHistory()["loss"][-1])
            if loss > WANTED_LOSS:
                raise SystemExit(f"the training did not work: its loss is {loss:.3f} after {epochs} epochs")
        if arguments.transform_rows:
            copies = -(-arguments.transform_rows // df.count())
            several = df.crossJoin(spark.range(copies).withColumnRenamed("id", "copy"))
            part = several.limit(arguments.transform_rows).repartition(RANKS).cache()
            part.count()
            start = time.perf_counter()
            model.transform(part).write.format("noop").mode("overwrite").save()
            results["transform_rows_per_s"] = arguments.transform_rows / (time.perf_counter() - start)
    arguments.results.write_text(json.dumps(results))
