"""The program of `fit_session` with horovod.spark's estimator; runs in that one's environment."""

from __future__ import annotations

from typing import Any

from horovod.spark.common.backend import SparkBackend
from horovod.spark.common.store import Store
from horovod.spark.keras import KerasEstimator
from tensorflow import keras

from benchmarks import fit_session, networks


def make_estimator(store: str, epochs: int) -> Any:
    """Make the estimator of a fit."""
    keywords = dict(fit_session.COMMON)
    # By default it would take the MPI that Horovod is compiled with, and know no launcher for it.
    backend = SparkBackend(keywords.pop("num_proc"), use_gloo=True)
    return KerasEstimator(
        backend=backend,
        store=Store.create(store),
        model=networks.mlp(keras),
        optimizer=keras.optimizers.Adam(1e-3),
        epochs=epochs,
        **keywords,
    )


if __name__ == "__main__":
    fit_session.run(make_estimator)
