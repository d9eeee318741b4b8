"""What the tests of real GPUs have in common: how Spark finds the devices, and a small fit on them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import cloudpickle
import keras
import numpy as np
import pytest
from faulty_fits import Trained
from hvdspark.estimators import KerasEstimator, KerasModel
from pyspark.sql import DataFrame

from hvdspark import Store

# One executor with two cores.
ONE_EXECUTOR = "local-cluster[1,2,4096]"

# As Spark's own script does, which needs bash, but the first device alone.
DISCOVERY = """#!/bin/sh
gpu=$(nvidia-smi --query-gpu=index --format=csv,noheader | head -n 1)
echo "{\\"name\\": \\"gpu\\", \\"addresses\\": [\\"$gpu\\"]}"
"""

# Executors cannot import it.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Where(keras.callbacks.Callback):
    """Writes down where the model's weights are."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = str(path)

    def on_train_end(self, logs: Any = None) -> None:
        Path(self._path).write_text(self.model.trainable_weights[0].value.device)


def fit(df: DataFrame, store: Store, run_id: str, **keywords: Any) -> KerasModel:
    """Fit a small network; NCCL says in the ranks' logs what it does."""
    keras.utils.set_random_seed(0)
    network = keras.Sequential([keras.Input((3,)), keras.layers.Dense(16, activation="tanh"), keras.layers.Dense(1)])
    settings: dict[str, Any] = {
        "num_proc": 1,
        "model": network,
        "optimizer": keras.optimizers.Adam(0.01),
        "loss": "mse",
        "feature_cols": [["a", "b", "c"]],
        "label_cols": ["y"],
        "batch_size": 32,
        "epochs": 4,
        "verbose": 0,
    }
    settings |= keywords
    settings["backend_env"] = {"NCCL_DEBUG": "INFO", **keywords.get("backend_env", {})}
    fitted: KerasModel = KerasEstimator(store=store, run_id=run_id, **settings).fit(df)
    return fitted


def assert_close(found: Trained, expected: Trained) -> None:
    """Check that two fits came to the same, but for what single precision on other devices makes of it."""
    assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-2)
    for mine, theirs in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-2, atol=2e-3)
