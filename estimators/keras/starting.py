"""Gives a Keras model the weights of another one that is built alike, of which only arrays are read."""

from __future__ import annotations

import io
import json
import re
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hvdspark.estimators.keras import codec

from hvdspark.errors import ModelFormatError, ParamError

if TYPE_CHECKING:
    import keras

_WEIGHTS = "model.weights.h5"
_ASSETS = "assets/"
_OPTIMIZER = "optimizer/"

# A weight in the file: the place of its layer, which is empty for those of the model itself, and its number there.
_WEIGHT = re.compile(r"(?:(.*)/)?vars/[^/]+")

# The name and the shapes of a layer's weights, by its place in the file.
_Layers = dict[str, tuple[str, list[tuple[int, ...]]]]


def start_from(model: bytes, start: bytes, custom_objects: Mapping[str, Any], origin: str) -> bytes:
    """Return a model with the weights of another one, and with an optimizer that has taken no step.

    Parameters
    ----------
    model
        The ``.keras`` file of the estimator's own model.
    start
        The ``.keras`` file whose weights it gets. Its configuration is not read, so that no code in it can run.
    custom_objects
        The user's own classes and functions.
    origin
        Where ``start`` is from, for errors.

    Raises
    ------
    ParamError
        When the models differ, naming the layer, what it has and what was found.
    ModelFormatError
        When a file is damaged.
    """
    codec.require_whole(start, origin)
    expected = _in_order(_layers(model, "the model"), _config(model, "the model"))
    if not any(shapes for _, shapes in expected.values()):
        raise ParamError(
            "warm_start needs a model that has its weights already, and this one learns its shapes from the first rows;"
            " begin it with keras.Input(shape), or call build()",
            param="warm_start",
        )
    _check_alike(expected, _layers(start, origin), origin)
    _check_entries(model, start, origin)
    donor = codec.model_from_bytes(model, custom_objects, safe_mode=False, compiled=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"start{codec.SUFFIX}"
        path.write_bytes(start)
        try:
            donor.load_weights(path)
        except Exception as exc:  # whatever Keras makes of arrays that are not what their shapes promised
            raise ModelFormatError(f"Keras cannot read the weights of {origin}: {exc}") from exc
    with warnings.catch_warnings():
        # An optimizer that has never been used has fewer variables in the file than it gets here.
        warnings.filterwarnings("ignore", message="Skipping variable loading for optimizer")
        started = codec.model_from_bytes(model, custom_objects, safe_mode=False)
    started.set_weights(donor.get_weights())
    _begin_anew(started, custom_objects)
    return codec.model_to_bytes(started)


def _begin_anew(model: keras.Model, custom_objects: Mapping[str, Any]) -> None:
    """Compile a model again whose optimizer has taken steps, with other weights than these."""
    import keras

    optimizer = getattr(model, "optimizer", None)
    if optimizer is None or int(optimizer.iterations) == 0:
        return
    with keras.saving.custom_object_scope(dict(custom_objects)):
        model.compile_from_config(model.get_compile_config())


def _check_alike(expected: _Layers, found: _Layers, origin: str) -> None:
    for place in [*expected, *(place for place in found if place not in expected)]:
        name, shapes = expected.get(place, ("", []))
        other, others = found.get(place, ("", []))
        if shapes != others:
            raise ParamError(
                f"warm_start: the layer '{name or other}' has {_shown(shapes)} in the model, and {_shown(others)} in"
                f" {origin}{_also(name, other)}; give the architecture that was trained, or begin without warm_start",
                param="warm_start",
            )


def _also(name: str, other: str) -> str:
    return f", where it is called '{other}'" if name and other and name != other else ""


def _shown(shapes: list[tuple[int, ...]]) -> str:
    return f"weights of shape {', '.join(map(str, shapes))}" if shapes else "no weights"


def _layers(data: bytes, origin: str) -> _Layers:
    """Return the layers that have weights, in the order of the file."""
    import h5py

    found: _Layers = {}

    def visit(path: str, item: Any) -> None:
        weight = _WEIGHT.fullmatch(path)
        if weight is not None and isinstance(item, h5py.Dataset) and not path.startswith(_OPTIMIZER):
            place = weight[1] or ""
            found.setdefault(place, (_name(archive, place), []))[1].append(tuple(item.shape))

    try:
        with zipfile.ZipFile(io.BytesIO(data)) as file, h5py.File(io.BytesIO(file.read(_WEIGHTS))) as archive:
            # Links that lead out of the file are not followed.
            archive.visititems(visit)
    except (KeyError, OSError, zipfile.BadZipFile, RuntimeError, ValueError) as exc:
        raise ModelFormatError(f"{origin} holds no weights that can be read: {exc}") from exc
    return found


def _in_order(layers: _Layers, config: Any) -> _Layers:
    """Put layers into the model's order, so that the first that differs is the one that was built otherwise."""
    try:
        names = [layer["config"]["name"] for layer in config["config"]["layers"]]
    except (KeyError, TypeError):
        return layers  # a class of the user's own
    order = {name: number for number, name in enumerate(names)}
    return dict(sorted(layers.items(), key=lambda item: order.get(item[1][0].split("/")[0], len(order))))


def _name(archive: Any, place: str) -> str:
    """Join the names of a layer and of those that it is in; the file orders them by their kinds."""
    parts = place.split("/")
    groups = [archive.get("/".join([*parts[: length + 1], "vars"])) for length in range(len(parts))]
    names = [str(group.attrs["name"]) for group in groups if group is not None and "name" in group.attrs]
    return "/".join(names) or place or "the model itself"


def _check_entries(model: bytes, start: bytes, origin: str) -> None:
    """Compare the vocabularies, which layers keep beside their weights: each row of these stands for an entry."""
    expected, found = _entries(model, "the model"), _entries(start, origin)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise ParamError(
                f"warm_start: the {name} of the model is not that of {origin}, so that its weights stand for other"
                " entries; give the layers the entries that were trained, or begin without warm_start",
                param="warm_start",
            )


def _entries(data: bytes, origin: str) -> dict[str, Any]:
    """Return what layers keep in files of their own, and the vocabularies in the configuration."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        files = {info.filename: info.CRC for info in archive.infolist() if info.filename.startswith(_ASSETS)}
    vocabularies = enumerate(_vocabularies(_config(data, origin)), 1)
    return files | {f"vocabulary {number}": value for number, value in vocabularies}


def _config(data: bytes, origin: str) -> Any:
    """Read the configuration as JSON; nothing is made of it."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        try:
            return json.loads(archive.read("config.json"))
        except (KeyError, ValueError, RecursionError) as exc:
            raise ModelFormatError(f"{origin} is no model file: its config.json cannot be read: {exc}") from exc


def _vocabularies(config: Any) -> Iterator[Any]:
    items = config.items() if isinstance(config, dict) else enumerate(config) if isinstance(config, list) else ()
    for name, value in items:
        if name == "vocabulary" and value is not None:
            yield value
        else:
            yield from _vocabularies(value)
