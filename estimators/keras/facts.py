"""What the record of a run says of Keras objects: short JSON values that people can read and compare."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import keras


def model_facts(model: keras.Model) -> dict[str, Any]:
    """Describe a model: its class, size, and a digest of its architecture, which names are no part of."""
    weights = model.weights if model.built else []
    try:
        digest = hashlib.sha256(repr(_without_names(model.get_config())).encode()).hexdigest()[:16]
    except (NotImplementedError, TypeError, ValueError):
        digest = None  # a class of the user's that does not say how it is made
    return {
        "class": type(model).__name__,
        "layers": len(model.layers),
        "weights": sum(math.prod(weight.shape) for weight in weights) or None,
        "architecture": digest,
    }


def config_facts(config: Any) -> Any:
    """Shorten what :func:`hvdspark.estimators.keras.codec.to_config` gave to classes and their settings."""
    if isinstance(config, list | tuple):
        return [config_facts(item) for item in config]
    if not isinstance(config, dict):
        return config if isinstance(config, str | int | float | bool | None) else str(config)
    if config.keys() == {"settings"}:
        return {**config_facts(config["settings"]["keras"]), **config_facts(config["settings"]["values"])}
    if len(config) == 1 and config.keys() <= {"keras", "dict", "list", "function"}:
        return config_facts(next(iter(config.values())))
    if "class_name" in config:
        inner = config.get("config")
        # Keras describes a function of its own as an object whose settings are its name.
        return {"class": config["class_name"], **config_facts(inner)} if isinstance(inner, dict) else str(inner)
    return {str(name): config_facts(item) for name, item in config.items()}


def _without_names(value: Any) -> Any:
    """Leave out names: Keras numbers layers by how many were made before, so equal models have other ones."""
    if isinstance(value, dict):
        left_out = ("name", "keras_history", "build_config", "input_layers", "output_layers")
        return {key: _without_names(item) for key, item in value.items() if key not in left_out}
    if isinstance(value, list | tuple):
        return [_without_names(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else type(value).__name__
