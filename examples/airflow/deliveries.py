"""How long a delivery takes: the stages before the network, and the network."""

import keras
from pyspark.ml.feature import StandardScaler, VectorAssembler


def stages():
    columns = ["distance_km", "items", "hour"]
    return [
        VectorAssembler(inputCols=columns, outputCol="raw"),
        StandardScaler(inputCol="raw", outputCol="features", withMean=True),
    ]


def network():
    return keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(32, activation="relu"), keras.layers.Dense(1, name="minutes")]
    )
