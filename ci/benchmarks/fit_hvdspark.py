"""The program of `fit_session` with hvdspark's estimator."""

from __future__ import annotations

from typing import Any

import keras
from hvdspark.estimators import KerasEstimator

from benchmarks import fit_session, networks
from hvdspark import Store


def make_estimator(store: str, **keywords: Any) -> KerasEstimator:
    """Make the estimator of a fit."""
    return KerasEstimator(
        store=Store.create(store), model=networks.mlp(keras), optimizer=keras.optimizers.Adam(1e-3), **keywords
    )


if __name__ == "__main__":
    fit_session.run(make_estimator)
