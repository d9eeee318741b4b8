"""The functions that job.yaml names: the stages before the network, and the network."""

from __future__ import annotations

import keras
from pyspark.ml import PipelineModel
from pyspark.ml.feature import Imputer, StandardScaler, StringIndexer, VectorAssembler

NUMBERS = ["dep_delay", "distance", "departure_hour"]
WEATHER = ["temp", "wind_speed", "visib"]
NAMES = ["carrier", "origin"]


def stages() -> list:
    """Names become numbers, gaps are filled, all numbers one scaled vector."""
    filled = [f"{name}_filled" for name in WEATHER]
    return [
        # "keep" gives names that training never saw a number of their own, instead of an error.
        StringIndexer(inputCols=NAMES, outputCols=[f"{name}_index" for name in NAMES], handleInvalid="keep"),
        Imputer(inputCols=WEATHER, outputCols=filled),
        VectorAssembler(inputCols=[*NUMBERS, *filled], outputCol="numbers"),
        StandardScaler(inputCol="numbers", outputCol="scaled", withMean=True),
    ]


def network(prepared: PipelineModel, units: int = 64) -> keras.Model:
    """Build the network; `prepared` are the fitted stages, `units` comes from model_args."""
    sizes = [len(labels) + 1 for labels in prepared.stages[0].labelsArray]
    numbers = keras.Input((len(NUMBERS) + len(WEATHER),), name="numbers")
    codes = [keras.Input((1,), name=name) for name in NAMES]
    embedded = [
        keras.layers.Flatten()(keras.layers.Embedding(size, 4)(code)) for size, code in zip(sizes, codes, strict=True)
    ]
    wide = keras.layers.Concatenate()([numbers, *embedded])
    deep = keras.layers.Dense(units, activation="relu")(wide)
    delay = keras.layers.Dense(1)(keras.layers.Concatenate()([wide, deep]))
    return keras.Model([numbers, *codes], keras.layers.Rescaling(40.0, name="delay")(delay))
