"""The networks that are trained and scored. Keras 3 and Keras 2 both make them."""

from __future__ import annotations

from typing import Any

from benchmarks.data import FEATURES

IMAGE_SIDE = 28


def mlp(keras: Any) -> Any:
    """Make the small network that tells two classes apart: 28-256-256-1, 74 thousand weights."""
    return keras.Sequential(
        [
            keras.Input((FEATURES,)),
            keras.layers.Dense(256, activation="relu"),
            keras.layers.Dense(256, activation="relu"),
            keras.layers.Dense(1, activation="sigmoid"),
        ]
    )


def convnet(keras: Any) -> Any:
    """Make a small convolutional network for grey images of 28 x 28."""
    return keras.Sequential(
        [
            keras.Input((IMAGE_SIDE, IMAGE_SIDE, 1)),
            keras.layers.Conv2D(16, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(32, 3, activation="relu"),
            keras.layers.MaxPooling2D(),
            keras.layers.Flatten(),
            keras.layers.Dense(10, activation="softmax"),
        ]
    )
