"""Keras objects to bytes and JSON and back: models as ``.keras`` files, all else by Keras' own configurations.

No pickle is involved: what comes from the Store or from a saved estimator or model is a ``.keras`` file, which Keras
loads in safe mode, or JSON.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvdspark.errors import ModelFormatError, ParamError, first_line
from hvdspark.plan import ModelTensor

if TYPE_CHECKING:
    import keras

SUFFIX = ".keras"


def model_to_bytes(model: keras.Model) -> bytes:
    """Save a model, with its weights and its compilation, as a ``.keras`` file.

    Raises
    ------
    ModelFormatError
        When Keras cannot save it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{SUFFIX}"
        try:
            with warnings.catch_warnings():
                # A model that is built by its first rows has no weights yet, and that is meant.
                warnings.filterwarnings("ignore", message="You are saving a model that has not yet been built")
                model.save(path)
        except (TypeError, ValueError, NotImplementedError) as exc:
            raise ModelFormatError(
                f"Keras cannot save the model '{model.name}': {exc}. A model class of your own needs get_config() and"
                " @keras.saving.register_keras_serializable()."
            ) from exc
        return path.read_bytes()


def model_from_bytes(
    data: bytes,
    custom_objects: Mapping[str, Any] | None = None,
    *,
    safe_mode: bool = True,
    compiled: bool = True,
    origin: str = "",
) -> keras.Model:
    """Load what :func:`model_to_bytes` saved.

    Parameters
    ----------
    data
        A ``.keras`` file.
    custom_objects
        The user's own classes and functions, by name.
    safe_mode
        Whether a model that holds code (a ``Lambda`` layer) is refused.
    compiled
        Whether to compile it as it was.
    origin
        Where the file is from, for the error.

    Raises
    ------
    ModelFormatError
        When it cannot be loaded.
    """
    import keras

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"model{SUFFIX}"
        path.write_bytes(data)
        try:
            with _loss_scaled_as_in(path):
                return keras.saving.load_model(
                    path, custom_objects=dict(custom_objects or {}), safe_mode=safe_mode, compile=compiled
                )
        except Exception as exc:  # whatever Keras makes of a file that is damaged, or was never a model
            what = f"the model of {origin}" if origin else "the model"
            raise ModelFormatError(
                f"Keras cannot load {what}: {_sentence(exc)} Give classes and functions of your own as"
                " custom_objects={'name': object}, register them with @keras.saving.register_keras_serializable(), or"
                " load within keras.saving.custom_object_scope(). A model with Lambda layers holds code and loads only"
                " with safe_mode=False, if you trust its source."
            ) from exc


def require_whole(data: bytes, origin: str) -> None:
    """Check that a ``.keras`` file is whole, without loading it.

    Raises
    ------
    ModelFormatError
        When it is not, naming where it is from.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, ValueError, RuntimeError) as exc:
        raise ModelFormatError(f"{origin} is no whole model file: {exc}") from exc
    if damaged is not None:
        raise ModelFormatError(f"{origin} is damaged: the checksum of its {damaged} does not fit")


@contextlib.contextmanager
def _loss_scaled_as_in(path: Path) -> Iterator[None]:
    """Take over the policy of a ``mixed_float16`` model for the time of a block.

    Keras scales the loss of models that are made under that policy. A file says it of the layers, and of a functional
    model not: loaded under another one, it would be trained without the scale, and small gradients would be lost.
    """
    import keras

    try:
        with zipfile.ZipFile(path) as archive:
            text = archive.read("config.json").decode()
    except (zipfile.BadZipFile, KeyError, UnicodeDecodeError):
        text = ""  # what is wrong with it Keras says better
    before = keras.config.dtype_policy()
    if '"name": "mixed_float16"' in text:
        keras.config.set_dtype_policy("mixed_float16")
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def to_config(value: Any) -> Any:
    """Turn a loss, metric, optimizer or a structure of them into JSON values.

    Names stay names, Keras objects become their configurations, functions their names (see :func:`functions_in`).

    Raises
    ------
    ParamError
        For anything else.
    """
    import keras

    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Mapping):
        return {"dict": {name: to_config(item) for name, item in value.items()}}
    if isinstance(value, list | tuple):
        return {"list": [to_config(item) for item in value]}
    if _is_own_function(value):
        return {"function": keras.saving.get_registered_name(value)}
    try:
        config = {"keras": keras.saving.serialize_keras_object(value)}
        settings = _lost_settings(value)
        return {"settings": {**config, "values": settings}} if settings else config
    except (TypeError, ValueError, NotImplementedError) as exc:
        raise ParamError(
            f"{value!r} cannot be turned into a Keras configuration: {_sentence(exc)} Give a name, a Keras object"
            " with get_config(), or a function.",
            param=type(value).__name__,
        ) from exc


def from_config(config: Any, custom_objects: Mapping[str, Any] | None = None) -> Any:
    """Make what :func:`to_config` described; raises :class:`ModelFormatError` for functions that are not given."""
    import keras

    if not isinstance(config, dict):
        return config
    ((kind, content),) = config.items()
    if kind == "dict":
        return {name: from_config(item, custom_objects) for name, item in content.items()}
    if kind == "list":
        return [from_config(item, custom_objects) for item in content]
    if kind == "function":
        return _function(content, custom_objects or {})
    if kind == "settings":
        found = from_config({"keras": content["keras"]}, custom_objects)
        found._fn_kwargs.update(content["values"])
        return found
    try:
        # Safe mode is what Keras takes by default; here it must not depend on that.
        return keras.saving.deserialize_keras_object(content, custom_objects=dict(custom_objects or {}), safe_mode=True)
    except Exception as exc:  # whatever Keras makes of a configuration that is none
        raise ModelFormatError(f"Keras cannot make an object of a saved configuration: {_sentence(exc)}") from exc


def _function(name: str, custom_objects: Mapping[str, Any]) -> Any:
    import keras

    found = keras.saving.get_registered_object(name, custom_objects=dict(custom_objects))
    if found is None:
        raise ModelFormatError(
            f"the function '{name}' is not known here: register it with @keras.saving.register_keras_serializable()"
            f" before loading, or load within keras.saving.custom_object_scope({{'{name}': {name}}})"
        )
    return found


def _is_own_function(value: Any) -> bool:
    """Whether a value is a function of the user's; Keras knows its own by name."""
    return inspect.isfunction(value) and not value.__module__.startswith("keras.")


def _lost_settings(value: Any) -> dict[str, Any]:
    """Return settings of a loss or metric that its own configuration leaves out, as that of Huber does its delta."""
    settings = getattr(value, "_fn_kwargs", None)
    kept = value.get_config() if settings else {}
    return {name: item for name, item in (settings or {}).items() if name not in kept}


def functions_in(value: Any) -> dict[str, Callable[..., Any]]:
    """Collect the functions that :func:`to_config` replaces by their names.

    Raises
    ------
    ParamError
        When two different ones have the same name.
    """
    import keras

    found: dict[str, Callable[..., Any]] = {}
    for item in _leaves(value):
        if _is_own_function(item):
            name = keras.saving.get_registered_name(item)
            if found.setdefault(name, item) is not item:
                raise ParamError(
                    f"two different functions are called '{name}'; Keras tells functions apart by their names: define"
                    " them with def under names of their own",
                    param="loss",
                )
    return found


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)
    else:
        yield value


def describe(model: keras.Model) -> tuple[tuple[ModelTensor, ...] | None, tuple[ModelTensor, ...] | None]:
    """Return the model's inputs and outputs in order; ``None`` for what only its first batch will tell."""
    return _tensors(model, "inputs"), _tensors(model, "outputs")


def _tensors(model: keras.Model, side: str) -> tuple[ModelTensor, ...] | None:
    try:
        tensors = getattr(model, side)
    except (AttributeError, ValueError):
        return None
    if not tensors:
        return None
    names = getattr(model, "output_names", None) if side == "outputs" else None
    return tuple(
        ModelTensor(
            name=names[index] if names and len(names) == len(tensors) else str(tensor.name),
            shape=tuple(tensor.shape[1:]),
            dtype=str(tensor.dtype),
        )
        for index, tensor in enumerate(tensors)
    )


def _sentence(exc: Exception) -> str:
    return first_line(exc).rstrip(".") + "."
