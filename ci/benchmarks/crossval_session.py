"""A Spark program that cross-validates once and notes how long that took."""

from __future__ import annotations

import argparse
from pathlib import Path

from pyspark.ml.evaluation import BinaryClassificationEvaluator
from pyspark.ml.tuning import CrossValidator, ParamGridBuilder

from benchmarks.comparison import seconds
from benchmarks.estimator import make_estimator
from benchmarks.session import CLUSTER, spark_session


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser()
    parser.add_argument("rows", type=Path, help="Parquet folder with the columns features and label")
    parser.add_argument("result", type=Path, help="file to write the seconds to")
    parser.add_argument("store", help="folder for the estimator's Store")
    parser.add_argument("--warm-pool", action=argparse.BooleanOptionalAction, required=True)
    arguments = parser.parse_args()
    with spark_session(CLUSTER) as spark:
        df = spark.read.parquet(str(arguments.rows))
        estimator = make_estimator(arguments.store, warm_pool=arguments.warm_pool)
        validator = CrossValidator(
            estimator=estimator,
            estimatorParamMaps=ParamGridBuilder().addGrid(estimator.learning_rate, [1e-3, 3e-3]).build(),
            evaluator=BinaryClassificationEvaluator(rawPredictionCol="label__output"),
            numFolds=2,
            seed=1,
        )
        arguments.result.write_text(repr(seconds(lambda: validator.fit(df))))


if __name__ == "__main__":
    main()
