"""Which digit is it? A small convolutional network on 1,797 handwritten digits (scikit-learn's), trained by two ranks.

An image is an array column of 64 numbers, which takes the shape of the model's input, (8, 8, 1), by itself. The program
ends with exit code 1 where fewer than 95 % of the held-out digits are read right.

    python examples/digits.py
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time

# Before Spark and TensorFlow start: executors are to run this very Python, and TensorFlow's notes are of no interest.
os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import pandas as pd
from hvdspark.estimators import KerasEstimator
from pyspark.ml.functions import vector_to_array
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from sklearn.datasets import load_digits

from hvdspark import Store

SEED = 8
WANTED = 0.95


def main() -> int:
    options = parse_options()
    started = time.perf_counter()
    spark = start_spark(options.master)
    try:
        train, test = read_digits(spark).randomSplit([0.8, 0.2], seed=SEED)
        with tempfile.TemporaryDirectory(prefix="hvdspark-digits-") as folder:
            model = estimator(options, Store.create(options.store or folder)).fit(train)
        print_fit(model.getHistory(), model.phases)
        answers = read(model.transform(test)).toPandas()
        print_answers(answers)
        print(f"Done in {time.perf_counter() - started:.0f} s")
    finally:
        spark.stop()
    accuracy = (answers["answer"] == answers["digit"]).mean()
    if accuracy < WANTED:
        print(f"FAILED: {accuracy:.1%} of the held-out digits are read right, less than {WANTED:.0%}", file=sys.stderr)
        return 1
    return 0


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--master", default="local[2]", help="Spark master (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="training processes (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=20, help="passes over the images (default: %(default)s)")
    parser.add_argument("--store", help="folder or URL that driver and executors reach (default: one for this run)")
    return parser.parse_args()


def start_spark(master: str) -> SparkSession:
    return (
        SparkSession.builder.appName("digits")
        .master(master)
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.log.level", "ERROR")
        .getOrCreate()
    )


def read_digits(spark: SparkSession) -> DataFrame:
    digits = load_digits()
    rows = pd.DataFrame({"image": digits.data.tolist(), "digit": digits.target})
    return spark.createDataFrame(rows, "image array<float>, digit int")


def estimator(options: argparse.Namespace, store: Store) -> KerasEstimator:
    return KerasEstimator(
        num_proc=options.ranks,
        store=store,
        model=convnet(),
        optimizer=keras.optimizers.Adam(1e-3),
        # "sparse": the labels are class numbers, not vectors of zeros and a one.
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
        feature_cols=["image"],
        label_cols=["digit"],
        output_cols=["probabilities"],
        batch_size=32,
        epochs=options.epochs,
        random_seed=SEED,
    )


def convnet() -> keras.Model:
    keras.utils.set_random_seed(SEED)
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            # The pixels are 0 to 16.
            keras.layers.Rescaling(1 / 16),
            keras.layers.Conv2D(16, 3, activation="relu", padding="same"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(32, 3, activation="relu", padding="same"),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dropout(0.2),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )


def read(scored: DataFrame) -> DataFrame:
    """Choose the digit with the largest probability."""
    by_digit = vector_to_array("probabilities")
    return scored.select("digit", (F.array_position(by_digit, F.array_max(by_digit)) - 1).alias("answer"))


def print_fit(history: dict[str, list[float]], phases: dict[str, float]) -> None:
    print(f"loss {history['loss'][0]:.3f} in the first epoch, {history['loss'][-1]:.3f} in the last")
    print("phases of the fit, seconds: " + ", ".join(f"{name} {seconds:.1f}" for name, seconds in phases.items()))


def print_answers(answers: pd.DataFrame) -> None:
    right = answers["answer"] == answers["digit"]
    print(f"held-out digits: {len(answers)}, read right: {right.mean():.1%}")
    if right.all():
        return
    by_digit = right.groupby(answers["digit"]).mean()
    worst = by_digit.idxmin()
    taken_for = answers.loc[(answers["digit"] == worst) & ~right, "answer"].value_counts()
    print(
        f"hardest digit: {worst}, read right {by_digit[worst]:.1%}; taken for "
        + ", ".join(f"{digit} ({count} x)" for digit, count in taken_for.items())
    )


if __name__ == "__main__":
    sys.exit(main())
