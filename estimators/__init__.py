"""Spark ML estimators and models that train with Horovod.

Import them from here: ``from hvdspark.estimators import KerasEstimator, KerasModel``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if __name__ != "hvdspark.estimators":
    # Saved models name their class by its import path, so there must be exactly one.
    raise ImportError(f"import hvdspark.estimators, not '{__name__}': install hvdspark ('pip install -e .') first")

if TYPE_CHECKING:
    from hvdspark.estimators.keras.estimator import KerasEstimator as KerasEstimator
    from hvdspark.estimators.keras.model import KerasModel as KerasModel

    from hvdspark.worker.checkpoint import BestOf as BestOf

# Loaded on first use: a training process imports the trainer from this package, and must not load pyspark with it.
_HOMES = {
    "KerasEstimator": "hvdspark.estimators.keras.estimator",
    "KerasModel": "hvdspark.estimators.keras.model",
    "BestOf": "hvdspark.worker.checkpoint",
}
__all__ = ["BestOf", "KerasEstimator", "KerasModel"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
