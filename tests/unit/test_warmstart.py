"""Weights of another model to begin with: what is taken over, what is refused, and what a run remembers of it."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from hvdspark.estimators.keras import codec
from hvdspark.estimators.keras.starting import start_from

from hvdspark import Store
from hvdspark.aliases import AliasEntry, promote
from hvdspark.errors import ModelFormatError, ParamError
from hvdspark.warmstart import Location, WarmStart, keep_start, locate, pinned, recall_start

X = np.random.default_rng(0).normal(size=(16, 3)).astype("float32")


def network(seed: int, *, wide: int = 8, outputs: int = 1, extra: bool = False, prefix: str = "") -> keras.Model:
    """Make a model with a normalization and a model within it; its weights depend on the seed."""
    keras.utils.set_random_seed(seed)
    inner = keras.Sequential(
        [keras.Input((wide,)), keras.layers.Dense(4, name="inner"), keras.layers.BatchNormalization(name="norm")],
        name="tower",
    )
    layers = [keras.Input((3,)), keras.layers.Dense(wide, activation="tanh", name=f"{prefix}wide"), inner]
    layers += [keras.layers.Dense(4, name="extra")] if extra else []
    model = keras.Sequential([*layers, keras.layers.Dropout(0.5), keras.layers.Dense(outputs, name="head")])
    model.compile("adam", "mse", metrics=["mae"])
    return model


def trained(seed: int, **kinds: Any) -> keras.Model:
    model = network(seed, **kinds)
    model.fit(X, np.ones((16, 1)), epochs=2, verbose=0)
    return model


@pytest.fixture(scope="module")
def champion() -> keras.Model:
    return trained(1)


def test_a_model_begins_with_all_weights_of_another_and_an_optimizer_without_steps(champion: keras.Model) -> None:
    own = trained(2, prefix="my_")
    before = own.get_weights()
    data = start_from(codec.model_to_bytes(own), codec.model_to_bytes(champion), {}, "there")
    started = codec.model_from_bytes(data)
    np.testing.assert_array_equal(started.predict(X, verbose=0), champion.predict(X, verbose=0))
    for one, other in zip(started.get_weights(), champion.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert int(own.optimizer.iterations) > 0
    moments = [np.asarray(v) for v in started.optimizer.variables if v.name != "learning_rate"]
    assert len(moments) == len(own.optimizer.variables) - 1
    assert not any(moment.any() for moment in moments)
    assert type(started.optimizer) is type(own.optimizer)
    # The layers are the estimator's own, and its model is as it was.
    assert [layer.name for layer in started.layers] == [layer.name for layer in own.layers]
    for one, other in zip(before, own.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (
            {"outputs": 2},
            "the layer 'head' has weights of shape (4, 1), (1,) in the model, and weights of shape (4, 2)",
        ),
        (
            {"extra": True},
            "the layer 'head' has weights of shape (4, 1), (1,) in the model, and weights of shape (4, 4)",
        ),
        (
            {"wide": 9},
            "the layer 'wide' has weights of shape (3, 8), (8,) in the model, and weights of shape (3, 9), (9,)",
        ),
    ],
)
def test_a_model_that_is_built_otherwise_is_refused_by_the_layer(kinds: dict[str, Any], message: str) -> None:
    other = codec.model_to_bytes(network(1, **kinds))
    with pytest.raises(ParamError, match=re.escape(message)) as caught:
        start_from(codec.model_to_bytes(network(2)), other, {}, "there")
    assert caught.value.param == "warm_start"
    assert "there" in str(caught.value)


def test_weights_that_only_one_of_both_has_are_named() -> None:
    def sequence(*layers: Any) -> bytes:
        return codec.model_to_bytes(keras.Sequential([keras.Input((4,)), *layers]))

    long = sequence(keras.layers.Dense(4, name="first"), keras.layers.LayerNormalization(name="norm"))
    short = sequence(keras.layers.Dense(4, name="only"))
    with pytest.raises(ParamError, match=r"the layer 'norm' has no weights in the model, and weights of shape \(4,\)"):
        start_from(short, long, {}, "there")
    with pytest.raises(ParamError, match=r"'norm' has weights of shape \(4,\), \(4,\) in the model, and no weights in"):
        start_from(long, short, {}, "there")
    # Of several that differ the model's first one is named, whatever their order in the file.
    wider = sequence(keras.layers.Dense(5), keras.layers.BatchNormalization())
    with pytest.raises(ParamError, match=r"the layer 'first' has .* of shape \(4, 6\), \(6,\) in the model"):
        start_from(sequence(keras.layers.Dense(6, name="first"), keras.layers.BatchNormalization()), wider, {}, "there")
    renamed = sequence(keras.layers.Dense(5, name="other"))
    with pytest.raises(ParamError, match=r"the layer 'only' has .* in there, where it is called 'other'"):
        start_from(short, renamed, {}, "there")


def test_weights_that_the_model_itself_holds_are_compared_and_taken_over() -> None:
    def scaled(size: int, value: float) -> keras.Model:
        model = Scale(size)
        model.build((None, size))
        model.scale.assign(np.full(size, value))
        return model

    objects = {"Scale": Scale}
    data = start_from(codec.model_to_bytes(scaled(2, 1)), codec.model_to_bytes(scaled(2, 7)), objects, "there")
    np.testing.assert_array_equal(codec.model_from_bytes(data, objects).scale, [7, 7])
    with pytest.raises(ParamError, match=r"has weights of shape \(2,\) in the model, and weights of shape \(3,\) in"):
        start_from(codec.model_to_bytes(scaled(2, 1)), codec.model_to_bytes(scaled(3, 7)), objects, "there")


class Scale(keras.Model):  # type: ignore[misc]
    """A model whose only weight is its own."""

    def __init__(self, size: int, **others: Any) -> None:
        super().__init__(**others)
        self.size = size

    def build(self, shape: Any) -> None:
        self.scale = self.add_weight(shape=(self.size,), name="scale")
        self.built = True

    def call(self, x: Any) -> Any:
        return x * self.scale

    def get_config(self) -> dict[str, Any]:
        return {"size": self.size}


def test_another_vocabulary_is_refused() -> None:
    def words(*vocabulary: str, adapted: bool = False) -> bytes:
        lookup = keras.layers.StringLookup(vocabulary=None if adapted else list(vocabulary), name="lookup")
        if adapted:
            lookup.adapt([[word] for word in vocabulary])
        layers = [keras.Input((1,), dtype="string"), lookup, keras.layers.Embedding(4, 2), keras.layers.Flatten()]
        return codec.model_to_bytes(keras.Sequential([*layers, keras.layers.Dense(1)]))

    start_from(words("a", "b", "c"), words("a", "b", "c"), {}, "there")
    with pytest.raises(ParamError, match="the vocabulary 1 of the model is not that of there"):
        start_from(words("a", "b", "c"), words("a", "c", "b"), {}, "there")
    with pytest.raises(ParamError, match=r"the assets/layers/.* of the model is not that of there"):
        start_from(words("a", "b", adapted=True), words("a", "c", adapted=True), {}, "there")


def test_a_model_that_is_not_built_has_nothing_to_compare(champion: keras.Model) -> None:
    unbuilt = keras.Sequential([keras.layers.Dense(1)])
    with pytest.raises(ParamError, match=r"begin it with keras\.Input"):
        start_from(codec.model_to_bytes(unbuilt), codec.model_to_bytes(champion), {}, "there")


def changed(data: bytes, change: Callable[[dict[str, bytes]], None]) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def test_of_the_other_model_only_arrays_are_read(champion: keras.Model, tmp_path: Path) -> None:
    mark = tmp_path / "planted code has run"
    code = f"lambda x: (__import__('pathlib').Path({str(mark)!r}).touch(), x)[1]"
    planted = keras.Sequential([keras.Input((3,)), keras.layers.Lambda(eval(code), output_shape=(3,))])
    mark.unlink(missing_ok=True)
    with zipfile.ZipFile(io.BytesIO(codec.model_to_bytes(planted))) as archive:
        config = archive.read("config.json")
    hostile = changed(codec.model_to_bytes(champion), lambda members: members.update({"config.json": config}))
    started = codec.model_from_bytes(start_from(codec.model_to_bytes(network(2)), hostile, {}, "there"))
    np.testing.assert_array_equal(started.predict(X, verbose=0), champion.predict(X, verbose=0))
    assert not mark.exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda members: members.pop("model.weights.h5"),
        lambda members: members.update({"model.weights.h5": b"no weights"}),
        lambda members: members.update({"model.weights.h5": members["model.weights.h5"][:2000]}),
    ],
)
def test_a_file_that_is_damaged_is_named(champion: keras.Model, change: Callable[[dict[str, bytes]], None]) -> None:
    damaged = changed(codec.model_to_bytes(champion), change)
    with pytest.raises(ModelFormatError, match="there"):
        start_from(codec.model_to_bytes(network(2)), damaged, {}, "there")
    with pytest.raises(ModelFormatError, match="there is no whole model file"):
        start_from(codec.model_to_bytes(network(2)), damaged[:500], {}, "there")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store")


def test_a_warm_start_is_an_alias_a_run_or_an_address(store: Store) -> None:
    store.publish_bytes(b"", "runs/monday/model.keras")
    promote(store, "champion", AliasEntry("monday", "runs/monday/model.keras"))
    promote(store, "candidate", AliasEntry("tuesday", "hdfs://host/models/tuesday"))
    promote(store, "inside", AliasEntry("wednesday", store.url_of("runs/wednesday/pipeline")))
    assert locate(store, "alias:champion") == Location("runs/monday/model.keras", is_inside=True, run_id="monday")
    assert locate(store, "alias:candidate") == Location("hdfs://host/models/tuesday", is_inside=False, run_id="tuesday")
    assert locate(store, "alias:inside") == Location("runs/wednesday/pipeline", is_inside=True, run_id="wednesday")
    assert locate(store, "runs/monday") == Location("runs/monday", is_inside=True, run_id="monday")
    assert locate(store, "/models/monday") == Location("/models/monday", is_inside=False)
    with pytest.raises(ParamError, match=r"there is no alias 'champ' in .*; promote a run first"):
        locate(store, "alias:champ")
    with pytest.raises(ParamError, match=r"there is no run 'mondy' in .* Did you mean 'monday'"):
        locate(store, "runs/mondy")


def test_a_job_begins_with_an_alias_or_a_run_by_its_name(store: Store) -> None:
    store.publish_bytes(b"{}", "runs", "monday.1", "run.json")
    promote(store, "champion", AliasEntry("monday.1", "/elsewhere/model"))
    for given, found in {
        "champion": "/elsewhere/model",
        "alias:champion": "/elsewhere/model",
        "monday.1": "runs/monday.1",
        "runs/monday.1": "runs/monday.1",
        "/any/path": "/any/path",
        "production": None,
    }.items():
        assert pinned(store, given, awaited=("production",)) == found
    for given, message in {
        "champoin": "neither an alias nor a run 'champoin' in .* Did you mean 'champion'",
        "monday": r"Did you mean 'monday\.1'\? Give an alias, a run, or the path",
        "alias:monday.1": r"there is no alias 'monday\.1' in",
        "prodution": "Did you mean 'production'",
        "runs/tuesday": "there is no run 'tuesday'",
        "saved model": "neither an alias nor a run 'saved model'",
    }.items():
        with pytest.raises(ParamError, match=message):
            pinned(store, given, awaited=("production",))


def test_a_run_that_goes_on_begins_with_what_it_began_with(store: Store) -> None:
    first = WarmStart.of("alias:champion", "runs/monday/model.keras", "monday", b"weights")
    assert recall_start(store, "new", "alias:champion", ".keras") is None
    keep_start(store, "new", first, ".keras")
    # The alias has moved: what was kept stays.
    keep_start(store, "new", WarmStart.of("alias:champion", "runs/x/model.keras", "x", b"others"), ".keras")
    assert recall_start(store, "new", "alias:champion", ".keras") == first
    note = json.loads(store.read_bytes("runs/new/warm_start.json"))
    assert note == {
        "given": "alias:champion",
        "model": "runs/monday/model.keras",
        "run_id": "monday",
        "sha256": first.sha256,
    }
    for other in ("runs/x", None):
        with pytest.raises(ParamError, match="'new' was begun with warm_start='alias:champion', and now it is"):
            recall_start(store, "new", other, ".keras")
    store.publish_bytes(b"damaged", "runs/new/checkpoints/start.keras")
    with pytest.raises(ModelFormatError, match="not the model that the run 'new' began with"):
        recall_start(store, "new", "alias:champion", ".keras")


def test_a_run_that_began_without_does_not_go_on_with_one(store: Store) -> None:
    store.publish_bytes(b"", "runs/cold/checkpoints/state-000000000004/manifest.json")
    assert recall_start(store, "cold", None, ".keras") is None
    with pytest.raises(ParamError, match="'cold' was begun with warm_start=None, and now it is 'runs/a'"):
        recall_start(store, "cold", "runs/a", ".keras")
