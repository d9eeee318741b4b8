"""One model that takes columns of many kinds at once."""

from __future__ import annotations

import datetime
import io
from typing import Any

import keras
import numpy as np
from hvdspark.estimators import KerasEstimator, KerasModel
from PIL import Image
from pyspark.ml.feature import HashingTF
from pyspark.sql import DataFrame, SparkSession

from hvdspark import Store

ROWS = 600
WIDTH = 8192  # wide enough to be stored sparse
DAY_MICROS = 86_400_000_000
START = datetime.datetime(2024, 1, 1)
CITIES = ["Köln", "Zürich", "東京"]


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def make_rows() -> list[tuple[Any, ...]]:
    """Make rows of which every column adds its own part to ``y``."""
    random = np.random.default_rng(0)
    rows: list[tuple[Any, ...]] = []
    for number in range(ROWS):
        bright = int(random.integers(0, 2))
        pixels = random.integers(0, 100, (6, 5, 3), dtype="uint8") + np.uint8(150 * bright)
        tokens = [int(token) for token in random.integers(1, 5, random.integers(1, 5))]
        city = int(random.integers(0, 3))
        rude = int(random.integers(0, 2))
        words = ["hello", f"name{number % 7}"] + ["dreadful"] * rude
        day = int(random.integers(0, 100))
        y = bright + (tokens[0] == 1) + 0.5 * city - rude + day / 100
        moment = START + datetime.timedelta(days=day, microseconds=number)
        rows.append((number, png(pixels), tokens, CITIES[city] if city else None, words, moment, float(y)))
    return rows


def frame(spark: SparkSession) -> DataFrame:
    schema = "id long, photo binary, tokens array<int>, city string, words array<string>, at timestamp_ntz, y double"
    df = spark.createDataFrame(spark.sparkContext.parallelize(make_rows(), 3), schema)
    return HashingTF(inputCol="words", outputCol="hashed", numFeatures=WIDTH).transform(df)


def network() -> keras.Model:
    keras.utils.set_random_seed(3)
    photo = keras.Input((6, 5, 3), name="photo")
    tokens = keras.Input((6,), dtype="int32", name="tokens")
    city = keras.Input((1,), dtype="string", name="city")
    hashed = keras.Input((WIDTH,), name="hashed")
    moment = keras.Input((1,), dtype="float64", name="at")
    begin = (START - datetime.datetime(1970, 1, 1)).days * DAY_MICROS
    scaled = keras.layers.Rescaling(1 / (100 * DAY_MICROS), -begin / (100 * DAY_MICROS), dtype="float64")(moment)
    lookup = keras.layers.StringLookup(vocabulary=[*CITIES[1:], "nowhere"], output_mode="one_hot")
    parts = [
        keras.layers.GlobalAveragePooling2D()(keras.layers.Rescaling(1 / 255)(photo)),
        keras.layers.Flatten()(keras.layers.Embedding(5, 3)(tokens)),
        lookup(city),
        keras.layers.Dense(1, use_bias=False)(hashed),
        keras.layers.Identity(dtype="float32")(scaled),
    ]
    hidden = keras.layers.Dense(16, activation="relu")(keras.layers.Concatenate()(parts))
    return keras.Model([photo, tokens, city, hashed, moment], keras.layers.Dense(1)(hidden))


def own_inputs(df: DataFrame) -> tuple[list[np.ndarray], np.ndarray]:
    """Make the model's inputs without any of this library."""
    rows = df.orderBy("id").collect()
    photos = np.stack([np.asarray(Image.open(io.BytesIO(row.photo))) for row in rows]).astype("float32")
    tokens = np.array([row.tokens + [0] * (6 - len(row.tokens)) for row in rows], "int32")
    cities = np.array([["nowhere" if row.city is None else row.city] for row in rows], dtype=object)
    hashed = np.stack([row.hashed.toArray() for row in rows]).astype("float32")
    epoch, micro = datetime.datetime(1970, 1, 1), datetime.timedelta(microseconds=1)
    moments = np.array([[(row["at"] - epoch) // micro] for row in rows], "float64")
    return [photos, tokens, cities, hashed, moments], np.array([row.y for row in rows])


def test_images_tokens_strings_sparse_vectors_and_timestamps_train_one_model(
    spark: SparkSession, store: Store, tmp_path: Any
) -> None:
    df = frame(spark).cache()
    stage = KerasEstimator(
        num_proc=2,
        store=store,
        model=network(),
        optimizer=keras.optimizers.Adam(0.01),
        loss="mse",
        feature_cols=["photo", "tokens", "city", "hashed", "at"],
        label_cols=["y"],
        padding={"tokens": 0},
        fill_nulls={"city": "nowhere"},
        validation=0.2,
        batch_size=16,
        epochs=12,
        verbose=0,
    )
    model = stage.fit(df)
    losses = model.getHistory()["val_loss"]
    scored = model.transform(df).orderBy("id").select("y", "y__output").collect()
    found = np.array([row.y__output for row in scored])
    inputs, y = own_inputs(df)
    assert losses[-1] < 0.1 * np.var(y) < losses[0]
    assert np.mean((found - y) ** 2) < 0.1 * np.var(y)
    tensors = [keras.ops.convert_to_tensor(values) for values in inputs]
    expected = np.asarray(model.getModel()(tensors))[:, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)

    model.write().overwrite().save(str(tmp_path / "model"))
    loaded = KerasModel.load(str(tmp_path / "model"))
    again = [row.y__output for row in loaded.transform(df.where("id < 20")).orderBy("id").collect()]
    np.testing.assert_allclose(again, found[:20], rtol=1e-5, atol=1e-5)
