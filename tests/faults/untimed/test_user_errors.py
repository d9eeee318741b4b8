"""What goes wrong on one rank alone, and would again: one error that names the rank and says what it was, at once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from faulty_fits import estimator
from hvdspark.estimators import KerasEstimator
from pyspark.sql import DataFrame

from hvdspark import Store
from hvdspark.errors import WorkerFailedError

WAYS = [{"allreduce": "shared_memory"}, {"allreduce": "horovod"}, {"allreduce": "horovod", "controller": "mpi"}]
IDS = ["shared_memory", "horovod", "mpi"]


def is_second() -> bool:
    return os.environ.get("HOROVOD_RANK") == "1"


def failing_loss(y_true: Any, y_pred: Any) -> Any:
    def fail(value: np.ndarray) -> np.ndarray:
        raise LookupError("the user's own mistake")

    value = keras.ops.mean(keras.ops.square(y_true - y_pred))
    return tf.ensure_shape(tf.py_function(fail, [value], tf.float32), ()) if is_second() else value


class Odd(keras.layers.Layer):
    """A layer that is not the same on all ranks: of another shape, or without a gradient."""

    def __init__(self, kind: str, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.kind = kind

    def build(self, shape: Any) -> None:
        self.scale = self.add_weight(shape=(2 if self.kind == "shape" and is_second() else 1,), name="scale")

    def call(self, x: Any) -> Any:
        frozen = self.kind == "gradient" and is_second()
        scale = keras.ops.stop_gradient(self.scale) if frozen else self.scale
        return x * keras.ops.sum(scale)

    def get_config(self) -> dict[str, Any]:
        return {**super().get_config(), "kind": self.kind}


def assert_fails_once(fit: KerasEstimator, df: DataFrame, text: str) -> None:
    store = fit.setRunId("odd").getStore()
    with pytest.raises(WorkerFailedError, match=text) as caught:
        fit.fit(df)
    assert not caught.value.is_passing
    assert [name for name in store.list("runs/odd/logs") if name.startswith("attempt")] == []


@pytest.mark.parametrize("way", WAYS, ids=IDS)
def test_an_error_within_a_compiled_step_is_that_of_its_rank(df: DataFrame, store: Store, way: dict[str, Any]) -> None:
    text = r"^rank 1 on .*: \w+: LookupError: the user's own mistake\n"
    assert_fails_once(estimator(store, **way).setLoss(failing_loss), df, text)


# Over Gloo the ranks tell each other the same way with both means of averaging.
@pytest.mark.parametrize("way", WAYS[::2], ids=IDS[::2])
def test_gradients_that_only_some_ranks_have_are_told_before_any_is_sent(
    df: DataFrame, store: Store, way: dict[str, Any]
) -> None:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1), Odd("gradient")])
    what = r"it has gradient 1 of 2: float32 \(3, 1\), the other gradient 1 of 3: float32 \(3, 1\)"
    text = rf"^rank 1 on .*: RankMismatchError: the gradients of rank 1 are not those of rank 0: {what}\."
    assert_fails_once(estimator(store, **way).setModel(model).setCustomObjects({"Odd": Odd}), df, text)


def test_weights_of_another_shape_on_one_rank_are_told(df: DataFrame, store: Store) -> None:
    # It learns its shapes from the first rows; one that is built could not be loaded.
    model = keras.Sequential([keras.layers.Dense(1), Odd("shape")])
    what = r"it has .*scale float32 \(2,\), the other .*scale float32 \(1,\)"
    text = rf"^rank 1 on .*: RankMismatchError: the weights of rank 1 are not those of rank 0: {what}\."
    assert_fails_once(estimator(store).setModel(model).setCustomObjects({"Odd": Odd}), df, text)


def test_a_damaged_row_group_is_named_by_the_rank_that_reads_it(df: DataFrame, store: Store) -> None:
    settings: dict[str, Any] = {"shuffle": False, "validation": None, "epochs": 1}
    estimator(store, **settings).fit(df)
    files = sorted(Path(store.path("datasets")).rglob("train/*.parquet"))
    content = bytearray(files[-1].read_bytes())
    content[len(content) // 3] ^= 255
    files[-1].write_bytes(content)
    text = rf"^rank \d on .*: CorruptDatasetError: row group 0 of .*{files[-1].name} cannot be read"
    assert_fails_once(estimator(store, **settings), df, text)
