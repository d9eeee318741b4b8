"""hvdspark's estimator as all cases use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
from hvdspark.estimators import KerasEstimator

from benchmarks import networks
from benchmarks.fit_session import COMMON
from hvdspark import Store


def make_estimator(store: str | Path, **keywords: Any) -> KerasEstimator:
    """Make an estimator for the MLP on two ranks; keywords add to what is common to all, or replace it."""
    return KerasEstimator(
        store=Store.create(store),
        model=networks.mlp(keras),
        optimizer=keras.optimizers.Adam(1e-3),
        **{**COMMON, **keywords},
    )
