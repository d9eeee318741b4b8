"""The GPUs of a process, as TensorFlow sees them."""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from hvdspark.launch import gpus


def visible_gpus() -> list[Any]:
    """List TensorFlow's devices for the GPUs that this process may use."""
    gpus.find_libraries()
    found: list[Any] = tf.config.list_physical_devices("GPU")
    return found


def use(device: Any) -> None:
    """Compute on this GPU and no other, and take of its memory what is needed, not all, as TensorFlow does by itself.

    Raises
    ------
    RuntimeError
        When TensorFlow is running already in this process.
    """
    tf.config.set_visible_devices(device, "GPU")
    tf.config.experimental.set_memory_growth(device, True)
