"""A rank's training as a whole, without Spark: what it does between steps, and what it leaves in the Store."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import keras
import pytest
import tensorflow as tf
from hvdspark.estimators import BestOf
from hvdspark.estimators.keras import codec
from rank_fits import fit_plan, keras_spec, rows, run_ranks

from hvdspark import Store


@pytest.fixture(autouse=True, scope="module")
def _travels_by_value() -> Iterator[None]:
    """The ranks cannot import this module."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


class Slow(keras.layers.Layer):  # type: ignore[misc]
    """Lets every step take some time."""

    def call(self, x: Any) -> Any:
        def wait(value: Any) -> Any:
            time.sleep(0.3)
            return value

        return tf.ensure_shape(tf.numpy_function(wait, [x], tf.float32), x.shape)

    def compute_output_shape(self, shape: Any) -> Any:
        return shape


def network(*layers: Any, loss: Any = "mse", width: int = 3) -> keras.Model:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((width,)), *layers, keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.01), loss, jit_compile=False)
    return model


def note_moves(path: Path) -> None:
    """Have this rank write down what it does, as its task would learn it."""
    from hvdspark.worker import pulse

    def moved_on(doing: str) -> None:
        with path.open("a") as file:
            file.write(f"{os.environ['HOROVOD_RANK']} {doing}\n")

    pulse.moved_on = moved_on  # type: ignore[assignment]


def count(path: Path, *words: str) -> int:
    return sum(all(word in line for word in words) for line in path.read_text().splitlines())


def test_a_rank_whose_steps_are_slow_moves_on_all_the_same(write_dataset: Callable[..., Any], tmp_path: Path) -> None:
    # Twelve steps of 0.3 s each, and half as many of validation.
    plan = fit_plan(write_dataset, rows(36 * 16), batch_rows=32, val_batch_rows=32, epochs=1, validation=1 / 3)
    spec = keras_spec(network(Slow()), custom_objects={"Slow": Slow})
    _, codes, errors = run_ranks(tmp_path, plan, spec, partial(note_moves, tmp_path / "moves"))
    assert codes == [0], errors
    assert count(tmp_path / "moves", "computing") >= plan.train.steps / 2
    assert plan.val is not None
    assert count(tmp_path / "moves", "validating") >= plan.val.steps / 2


def test_a_rank_whose_steps_are_fast_takes_many_at_a_time(write_dataset: Callable[..., Any], tmp_path: Path) -> None:
    plan = fit_plan(write_dataset, rows(4000), batch_rows=8, epochs=2)
    _, codes, errors = run_ranks(tmp_path, plan, keras_spec(network()), partial(note_moves, tmp_path / "moves"))
    assert codes == [0], errors
    assert count(tmp_path / "moves", "epoch 2", "computing") < plan.train.steps / 8


class NoNumber(keras.losses.Loss):  # type: ignore[misc]
    """Is no number for labels above 100, while its gradients are well."""

    def call(self, y_true: Any, y_pred: Any) -> Any:
        wrong = keras.ops.where(y_true > 100, math.nan, 0.0)
        return keras.ops.square(y_true - y_pred) + keras.ops.stop_gradient(wrong)


@pytest.mark.parametrize("bad", [False, True])
def test_callbacks_of_keras_that_look_at_epochs_or_at_the_loss_leave_many_steps_to_a_call(
    write_dataset: Callable[..., Any], tmp_path: Path, bad: bool
) -> None:
    x, y = rows(4000)
    if bad:
        y[2000] = 101
    plan = fit_plan(write_dataset, (x, y), batch_rows=8, epochs=3)
    callbacks = [keras.callbacks.TerminateOnNaN(), keras.callbacks.ModelCheckpoint(str(tmp_path / "{epoch}.keras"))]
    # With "skip" a loss that is no number is no error of ours.
    spec = keras_spec(network(loss=NoNumber()), *callbacks, on_nan="skip", custom_objects={"NoNumber": NoNumber})
    result, codes, errors = run_ranks(tmp_path, plan, spec, partial(note_moves, tmp_path / "moves"))
    assert codes == [0], errors
    assert result is not None
    epochs = 1 if bad else 3
    assert len(result.history["loss"]) == epochs
    assert math.isnan(result.history["loss"][0]) is bad
    assert sorted(path.name for path in tmp_path.glob("*.keras")) == [f"{number + 1}.keras" for number in range(epochs)]
    assert count(tmp_path / "moves", "computing") < epochs * plan.train.steps / 8


@pytest.mark.parametrize("allreduce", ["shared_memory", "horovod"])
def test_a_bad_step_is_found_where_a_rank_has_fewer_rows_than_another(
    write_dataset: Callable[..., Any], tmp_path: Path, allreduce: str
) -> None:
    # Rank 0 has 21 steps with rows, rank 1 has 20 and a filler, which is a call of its own.
    x, y = rows(20 * 64 + 1)
    x[5 * 64 + 40] = math.nan
    plan = fit_plan(write_dataset, (x, y), size=2, shuffle=False)
    assert [plan.train.own_steps(rank) for rank in range(2)] == [21, 20]
    result, codes, errors = run_ranks(tmp_path, plan, keras_spec(network(), allreduce=allreduce))
    assert result is None
    assert codes != [0, 0]
    assert "NonFiniteLossError: epoch 1, step 6 of 21: the gradient of rank 1 is not finite" in errors


def note_models(path: Path, fatal: int = 0) -> None:
    """Have this rank write down how often a model becomes bytes, and what is written; one of these times kills it."""
    from hvdspark.estimators.keras import codec

    from hvdspark.store import Store

    serialize, publish = codec.model_to_bytes, Store.publish_bytes

    def note(what: str) -> None:
        with path.open("a") as file:
            file.write(f"{what}\n")

    def model_to_bytes(model: keras.Model) -> bytes:
        note("serialized")
        if count(path, "serialized") == fatal:
            os.kill(os.getpid(), 9)
        return serialize(model)

    def publish_bytes(store: Store, data: bytes, *parts: str) -> None:
        publish(store, data, *parts)
        note(parts[-1].removeprefix("runs/run/"))

    codec.model_to_bytes, Store.publish_bytes = model_to_bytes, publish_bytes  # type: ignore[method-assign]


def models_and_states(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    return [line for line in lines if line == "serialized" or line.endswith((".keras", "/manifest"))]


STATES = [f"checkpoints/state-{step:012d}/manifest" for step in (4, 8)]


@pytest.mark.parametrize(
    ("best_of", "callbacks", "expected"),
    [
        (None, [], ["serialized", "checkpoints/last.keras", STATES[0], "serialized", "model.keras"]),
        (
            BestOf("loss"),
            [],
            [
                *("serialized", "checkpoints/last.keras", "checkpoints/best.keras", STATES[0]),
                *("serialized", "checkpoints/best.keras", "checkpoints/last.keras", "model.keras"),
            ],
        ),
        (
            None,
            # What it does at the end may fail, or take long.
            [keras.callbacks.EarlyStopping(monitor="loss", restore_best_weights=True)],
            ["serialized", "checkpoints/last.keras", *STATES, "serialized", "model.keras"],
        ),
    ],
    ids=["last", "best", "callback"],
)
def test_a_model_is_written_no_more_often_than_it_changes(
    write_dataset: Callable[..., Any],
    tmp_path: Path,
    best_of: BestOf | None,
    callbacks: list[Any],
    expected: list[str],
) -> None:
    plan = fit_plan(write_dataset, rows(128), epochs=2)
    spec = keras_spec(network(), *callbacks, best_of=best_of)
    result, codes, errors = run_ranks(tmp_path, plan, spec, partial(note_models, tmp_path / "models"))
    assert codes == [0], errors
    assert result is not None
    assert result.history["loss"][1] < result.history["loss"][0]
    assert models_and_states(tmp_path / "models") == expected
    store = Store.from_ref(plan.store)
    assert store.list("runs/run/checkpoints") == ([] if best_of is None else ["best.keras", "last.keras"])
    codec.require_whole(store.read_bytes(result.model_path), "it")


def test_a_rank_that_is_killed_while_it_publishes_goes_on_from_the_epoch_before(
    write_dataset: Callable[..., Any], tmp_path: Path
) -> None:
    data = rows(128)
    undisturbed, _, errors = run_ranks(tmp_path, fit_plan(write_dataset, data), keras_spec(network()))
    assert undisturbed is not None, errors
    plan = fit_plan(write_dataset, data)
    killed = run_ranks(tmp_path, plan, keras_spec(network()), partial(note_models, tmp_path / "models", 2))
    assert killed[:2] == (None, [-9])
    result, codes, errors = run_ranks(tmp_path, plan, keras_spec(network()), partial(note_models, tmp_path / "again"))
    assert codes == [0], errors
    assert result is not None
    assert models_and_states(tmp_path / "again") == ["serialized", "model.keras"]
    assert result.history["loss"] == pytest.approx(undisturbed.history["loss"], rel=1e-5)


def test_a_model_that_cannot_be_published_is_kept_as_a_state(write_dataset: Callable[..., Any], tmp_path: Path) -> None:
    plan = fit_plan(write_dataset, rows(256), size=2)
    store = Store.from_ref(plan.store)
    store.make_folder("runs/run/model.keras")
    _, codes, errors = run_ranks(tmp_path, plan, keras_spec(network()))
    assert codes != [0, 0]
    assert "StoreError: cannot write" in errors
    assert "goes on from the last checkpoint" in errors
    assert [name for name in store.list("runs/run/checkpoints") if name.startswith("state-")] == [
        "state-000000000004",
        "state-000000000008",
    ]
    store.delete("runs/run/model.keras")
    result, codes, errors = run_ranks(tmp_path, plan, keras_spec(network()), partial(note_moves, tmp_path / "moves"))
    assert codes == [0, 0], errors
    assert result is not None
    assert len(result.history["loss"]) == 2
    assert count(tmp_path / "moves", "computing") == 0
