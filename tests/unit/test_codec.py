"""Keras objects to JSON and bytes and back: nothing lost, nothing executed."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest
from hvdspark.estimators import KerasEstimator
from hvdspark.estimators.keras import codec

from hvdspark.errors import ModelFormatError, ParamError
from hvdspark.plan import ModelTensor

TRUTH = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0]], "float32")
GUESS = np.array([[0.1, 0.9], [0.6, 0.4], [-3.0, 2.5]], "float32")


def custom_loss(y_true: Any, y_pred: Any) -> Any:
    return keras.ops.mean(keras.ops.abs(y_true - y_pred) ** 3, axis=-1)


def make_loss(power: int) -> Any:
    def loss(y_true: Any, y_pred: Any) -> Any:
        return keras.ops.mean(keras.ops.abs(y_true - y_pred) ** power, axis=-1)

    return loss


class Doubling(keras.layers.Layer):
    """Twice its input: a layer of the user's own, which Keras does not know by itself."""

    def call(self, inputs: Any) -> Any:
        return inputs * 2


@pytest.fixture(autouse=True)
def _no_registered_objects() -> Iterator[None]:
    """Leave no object registered with Keras behind."""
    before = dict(keras.saving.get_custom_objects())
    yield
    keras.saving.get_custom_objects().clear()
    keras.saving.get_custom_objects().update(before)


def through_json(value: Any, custom_objects: dict[str, Any] | None = None) -> Any:
    return codec.from_config(json.loads(json.dumps(codec.to_config(value))), custom_objects)


@pytest.mark.parametrize(
    "value",
    [
        None,
        "mse",
        0.5,
        3,
        True,
        [],
        {},
        ["mse", None, 0.25],
        [["mae"], ["mse", "mae"]],
        {"a": "mse", "b": ["mae", {"c": None}]},
        {"dict": "mse", "list": "mae", "keras": "mse", "function": "mae"},
    ],
    ids=str,
)
def test_names_numbers_and_structures_come_back_as_they_were(value: Any) -> None:
    assert through_json(value) == value


def test_tuples_come_back_as_lists() -> None:
    assert through_json(("mse", {"a": (1, 2)})) == ["mse", {"a": [1, 2]}]


@pytest.mark.parametrize(
    "value", [np.float32(0.5), np.float64(0.5), np.int64(2)], ids=lambda value: type(value).__name__
)
def test_loss_weights_may_be_numpy_numbers(value: Any) -> None:
    assert through_json([value]) == [value]


@pytest.mark.parametrize(
    "loss",
    [
        keras.losses.MeanSquaredError(),
        keras.losses.MeanSquaredError(reduction="sum"),
        keras.losses.BinaryCrossentropy(from_logits=True, label_smoothing=0.1),
        keras.losses.CategoricalFocalCrossentropy(alpha=0.5, gamma=3.0),
        keras.losses.Tversky(alpha=0.2, beta=0.8),
        keras.losses.Huber(delta=0.05),
        keras.losses.CosineSimilarity(axis=0),
    ],
    ids=lambda loss: loss.name,
)
def test_a_loss_comes_back_with_its_settings(loss: Any) -> None:
    again = through_json(loss)
    assert type(again) is type(loss)
    assert float(again(TRUTH, GUESS)) == float(loss(TRUTH, GUESS))


@pytest.mark.parametrize(
    "metric",
    [
        keras.metrics.AUC(curve="PR", num_thresholds=20, name="area"),
        keras.metrics.BinaryAccuracy(threshold=0.95),
        keras.metrics.F1Score(average="macro"),
        keras.metrics.TopKCategoricalAccuracy(k=1),
    ],
    ids=lambda metric: metric.name,
)
def test_a_metric_comes_back_with_its_settings(metric: Any) -> None:
    metric.reset_state()
    again = through_json(metric)
    assert (type(again), again.name) == (type(metric), metric.name)
    for each in (metric, again):
        each.update_state(TRUTH, np.abs(GUESS) / 3)
    assert float(again.result()) == float(metric.result())


@pytest.mark.parametrize(
    "optimizer",
    [
        keras.optimizers.Adam(0.01, beta_1=0.8, clipnorm=1.0, weight_decay=1e-4),
        keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 100, 0.9), momentum=0.9, nesterov=True),
        keras.optimizers.LossScaleOptimizer(keras.optimizers.RMSprop(0.02)),
    ],
    ids=lambda optimizer: optimizer.name,
)
def test_an_optimizer_comes_back_with_its_settings(optimizer: Any) -> None:
    again = through_json(optimizer)
    assert type(again) is type(optimizer)
    assert again.get_config() == optimizer.get_config()


def test_a_function_travels_by_its_name_and_is_found_among_the_custom_objects() -> None:
    assert codec.to_config([custom_loss, "mse"]) == {"list": [{"function": "custom_loss"}, "mse"]}
    assert codec.functions_in({"a": [custom_loss, "mse"], "b": (custom_loss, None)}) == {"custom_loss": custom_loss}
    assert through_json({"a": custom_loss}, {"custom_loss": custom_loss}) == {"a": custom_loss}


def test_a_registered_function_needs_no_custom_objects() -> None:
    keras.saving.get_custom_objects()["custom_loss"] = custom_loss
    assert through_json(custom_loss) is custom_loss


def test_a_function_that_is_not_given_is_named() -> None:
    with pytest.raises(ModelFormatError, match=r"'custom_loss' is not known here: register it with"):
        through_json(custom_loss)


@pytest.mark.parametrize("function", [keras.losses.binary_crossentropy, keras.metrics.mean_absolute_error])
def test_functions_of_keras_itself_are_always_known(function: Any) -> None:
    assert through_json(function) is function


@pytest.mark.parametrize(
    ("first", "second"),
    [(make_loss(1), make_loss(2)), (lambda y, p: y - p, lambda y, p: p - y)],
    ids=["closures", "lambdas"],
)
def test_two_functions_of_one_name_are_kept_apart_or_refused(first: Any, second: Any) -> None:
    estimator = KerasEstimator(loss={"a": first, "b": second})
    try:
        objects = estimator._all_custom_objects()
        again = codec.from_config(codec.to_config(estimator.getLoss()), objects)
    except ParamError:
        return
    assert float(keras.ops.sum(again["a"](TRUTH, GUESS))) == float(keras.ops.sum(first(TRUTH, GUESS)))
    assert float(keras.ops.sum(again["b"](TRUTH, GUESS))) == float(keras.ops.sum(second(TRUTH, GUESS)))


def test_what_has_no_configuration_is_refused_with_itself_and_a_remedy() -> None:
    class Nothing:
        def __repr__(self) -> str:
            return "<nothing>"

    with pytest.raises(ParamError, match=r"<nothing> cannot be turned into a Keras configuration.*get_config"):
        codec.to_config({"a": Nothing()})


def small_model(*extra: Any) -> keras.Model:
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(3, "tanh"), *extra, keras.layers.Dense(1)])


def predictions(model: keras.Model) -> Any:
    return np.asarray(model(TRUTH + GUESS))


def test_a_model_comes_back_with_its_weights_and_its_compilation() -> None:
    model = small_model()
    model.compile(keras.optimizers.SGD(0.25), loss="mae", metrics=["mse"])
    again = codec.model_from_bytes(codec.model_to_bytes(model))
    assert np.array_equal(predictions(again), predictions(model))
    assert again.compiled
    assert float(again.optimizer.learning_rate) == 0.25
    assert again.loss == "mae"


def test_a_model_that_is_loaded_without_compilation_has_none() -> None:
    model = small_model()
    model.compile("sgd", loss="mae")
    assert not codec.model_from_bytes(codec.model_to_bytes(model), compiled=False).compiled


def test_saving_does_not_change_the_model() -> None:
    model = small_model()
    before = [np.array(weight) for weight in model.get_weights()]
    codec.model_to_bytes(model)
    assert not model.compiled
    assert all(np.array_equal(old, new) for old, new in zip(before, model.get_weights(), strict=True))


def test_a_model_file_holds_json_and_hdf5_alone() -> None:
    with zipfile.ZipFile(io.BytesIO(codec.model_to_bytes(small_model()))) as file:
        members = {name: file.read(name) for name in file.namelist()}
    assert set(members) == {"config.json", "metadata.json", "model.weights.h5"}
    assert json.loads(members["config.json"])["class_name"] == "Sequential"
    assert members["model.weights.h5"].startswith(b"\x89HDF\r\n")


def test_a_layer_of_the_users_own_is_asked_for_and_then_taken() -> None:
    data = codec.model_to_bytes(small_model(Doubling()))
    with pytest.raises(ModelFormatError, match=r"custom_objects=\{'name': object\}"):
        codec.model_from_bytes(data)
    again = codec.model_from_bytes(data, {"Doubling": Doubling})
    assert np.array_equal(predictions(again), predictions(small_model(Doubling())))


def test_a_lambda_layer_is_code_and_loads_only_where_it_is_trusted() -> None:
    model = small_model(keras.layers.Lambda(lambda x: x * 3))
    data = codec.model_to_bytes(model)
    with pytest.raises(ModelFormatError, match=r"safe_mode=False"):
        codec.model_from_bytes(data)
    assert np.array_equal(predictions(codec.model_from_bytes(data, safe_mode=False)), predictions(model))


def test_a_model_class_without_a_configuration_cannot_be_saved() -> None:
    class Own(keras.Model):
        def __init__(self, units: Any) -> None:
            super().__init__()
            self.dense = keras.layers.Dense(1)
            self.units = units

        def call(self, inputs: Any) -> Any:
            return self.dense(inputs)

    model = Own(object())
    model(TRUTH)
    with pytest.raises(ModelFormatError, match=r"Keras cannot save the model 'own'[\s\S]*get_config"):
        codec.model_to_bytes(model)


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99], ids=["nothing", "ten bytes", "half", "most"])
def test_a_file_that_was_cut_off_is_refused(keep: float) -> None:
    data = codec.model_to_bytes(small_model())
    with pytest.raises(ModelFormatError, match=r"Keras cannot load the model"):
        codec.model_from_bytes(data[: int(keep if keep >= 1 else keep * len(data))])


@pytest.mark.parametrize("data", [b"not a model", b"PK\x05\x06" + bytes(18), b"\x80\x04N."])
def test_bytes_that_are_no_model_are_refused(data: bytes) -> None:
    with pytest.raises(ModelFormatError, match=r"Keras cannot load the model"):
        codec.model_from_bytes(data)


def test_a_model_with_several_inputs_and_outputs_is_described_in_its_order() -> None:
    left = keras.Input((4,), name="left")
    right = keras.Input((), dtype="int32", name="right")
    joined = keras.layers.Concatenate()([left, keras.layers.Embedding(5, 3)(right)])
    outputs = [keras.layers.Dense(1, name="price")(joined), keras.layers.Dense(7, "softmax", name="kind")(joined)]
    inputs_found, outputs_found = codec.describe(keras.Model([left, right], outputs))
    assert inputs_found == (ModelTensor("left", (4,), "float32"), ModelTensor("right", (), "int32"))
    assert outputs_found == (ModelTensor("price", (1,), "float32"), ModelTensor("kind", (7,), "float32"))


def test_open_axes_are_described_as_open() -> None:
    model = keras.Sequential([keras.Input((None, 8)), keras.layers.LSTM(2)])
    inputs, outputs = codec.describe(model)
    assert inputs is not None
    assert outputs is not None
    assert (inputs[0].shape, inputs[0].size) == ((None, 8), None)
    assert outputs[0].shape == (2,)


def test_a_model_that_is_not_built_describes_nothing() -> None:
    class Own(keras.Model):
        def call(self, inputs: Any) -> Any:
            return inputs

    assert codec.describe(keras.Sequential([keras.layers.Dense(1)])) == (None, None)
    assert codec.describe(Own()) == (None, None)


def test_describing_survives_saving() -> None:
    model = small_model()
    again = codec.model_from_bytes(codec.model_to_bytes(model))
    for found, expected in zip(codec.describe(again), codec.describe(model), strict=True):
        assert found is not None
        assert expected is not None
        assert [(tensor.shape, tensor.dtype) for tensor in found] == [
            (tensor.shape, tensor.dtype) for tensor in expected
        ]


@pytest.mark.parametrize(
    ("given", "rising"),
    [
        ({"monitor": "val_loss"}, False),
        ({"monitor": "val_accuracy"}, True),
        ({"monitor": "val_loss", "mode": "max"}, True),
        ({"monitor": "val_accuracy", "mode": "min"}, False),
    ],
    ids=str,
)
def test_a_model_checkpoint_that_saves_the_best_says_which_epoch_is_kept(given: dict[str, str], rising: bool) -> None:
    callback = keras.callbacks.ModelCheckpoint("unused.keras", save_best_only=True, **given)
    found = KerasEstimator(checkpoint_callback=callback)._best_of()
    assert found is not None
    assert (found.monitor, found.rising) == (given["monitor"], rising)


def test_a_model_checkpoint_that_saves_all_keeps_the_last() -> None:
    callback = keras.callbacks.ModelCheckpoint("unused.keras")
    assert KerasEstimator(checkpoint_callback=callback)._best_of() is None


def test_another_checkpoint_callback_is_refused() -> None:
    with pytest.raises(ParamError, match=r"checkpoint_callback is a EarlyStopping; give .*BestOf"):
        KerasEstimator(checkpoint_callback=keras.callbacks.EarlyStopping())._best_of()  # type: ignore[arg-type]


@pytest.mark.parametrize("functional", [False, True])
def test_a_model_of_half_precision_still_scales_its_loss_when_it_is_loaded(functional: bool) -> None:
    """Keras goes by the process's policy there, which in a rank and in a later session is another one."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    try:
        layers = [keras.Input((3,)), keras.layers.Dense(2), keras.layers.Dense(1, dtype="float32")]
        model = keras.Sequential(layers)
        if functional:
            model = keras.Model(layers[0], layers[2](layers[1](layers[0])))
        model.compile("adam", loss="mse", jit_compile=False)
        model.fit(np.ones((8, 3)), np.ones(8), verbose=0)
    finally:
        keras.config.set_dtype_policy(before)
    loaded = codec.model_from_bytes(codec.model_to_bytes(model))
    assert isinstance(loaded.optimizer, keras.optimizers.LossScaleOptimizer)
    assert len(loaded.optimizer.variables) == len(model.optimizer.variables)
    for mine, theirs in zip(loaded.optimizer.variables, model.optimizer.variables, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert keras.config.dtype_policy().name == before.name
