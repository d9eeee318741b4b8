"""Metrics over the rows of all ranks are those of one process that saw them all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import numpy.typing as npt
import pytest
from hvdspark.estimators.keras.metrics import global_metrics

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(11, 4)).astype("float32")
CLASSES = np.eye(3, dtype="float32")[RANDOM.integers(0, 3, 11)]
BINARY = RANDOM.integers(0, 2, (11, 1)).astype("float32")
WEIGHTS = RANDOM.random(11).astype("float32")

Vector = npt.NDArray[np.float64]


def session(*others: Vector) -> Any:
    """Stand for Horovod: adds what the other ranks gave, and keeps what this one gave."""
    found = SimpleNamespace(given=None)

    def total(values: Vector, _name: str) -> Vector:
        found.given = values.copy()
        return np.sum([values, *others], axis=0)  # type: ignore[no-any-return]

    found.sum = total
    return found


def evaluated(metrics: Any, y: Any, rows: slice, weights: Any = None) -> keras.Model:
    """Return a model whose metrics hold the state of some rows, seen in batches of four."""
    keras.utils.set_random_seed(0)
    units = y.shape[1]
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(units, "softmax" if units > 1 else "sigmoid")])
    model.compile(loss="categorical_crossentropy" if units > 1 else "binary_crossentropy", metrics=metrics())
    for start in range(rows.start, rows.stop, 4):
        part = slice(start, min(start + 4, rows.stop))
        model.test_step((X[part], y[part]) if weights is None else (X[part], y[part], weights[part]))
    if rows.start == rows.stop:
        model.test_step((X[:1], y[:1]))
        model.reset_metrics()
    return model


def over_ranks(metrics: Any, y: Any, cuts: Sequence[int], weights: Any = None) -> list[dict[str, float]]:
    """Return what each rank gets, when the rows are cut among them."""
    shares = [slice(start, stop) for start, stop in zip([0, *cuts], [*cuts, len(X)], strict=True)]
    models = [evaluated(metrics, y, share, weights) for share in shares]
    given = []
    for model, share in zip(models, shares, strict=True):
        # Without other ranks the state stays as it is, so that the model can be used again.
        by_itself = session()
        global_metrics(model, by_itself, share.stop - share.start, "metrics")
        given.append(by_itself.given)
    found = []
    for rank, (model, share) in enumerate(zip(models, shares, strict=True)):
        others = session(*[vector for other, vector in enumerate(given) if other != rank])
        found.append(global_metrics(model, others, share.stop - share.start, "metrics"))
    return found


def alone(metrics: Any, y: Any, weights: Any = None) -> dict[str, float]:
    values = evaluated(metrics, y, slice(0, len(X)), weights).get_metrics_result()
    return {name: np.asarray(value).item() for name, value in values.items() if np.size(value) == 1}


@pytest.mark.parametrize(
    ("cuts", "weights"), [([7], WEIGHTS), ([1, 10], None), ([0], None)], ids=["two weighted", "three", "one idle"]
)
@pytest.mark.parametrize(
    ("metrics", "y"),
    [
        (lambda: ["accuracy", "mae"], BINARY),
        (lambda: [keras.metrics.AUC(name="m", num_thresholds=50)], BINARY),
        (lambda: [keras.metrics.AUC(name="m", curve="PR", num_thresholds=20, multi_label=True)], CLASSES),
        (lambda: [keras.metrics.RootMeanSquaredError(name="m")], CLASSES),
        (lambda: [keras.metrics.Precision(name="m"), keras.metrics.Recall(name="n")], BINARY),
        (lambda: [keras.metrics.F1Score(name="m", average="macro")], CLASSES),
        (lambda: [keras.metrics.R2Score(name="m")], CLASSES),
        (lambda: [keras.metrics.OneHotMeanIoU(num_classes=3, name="m")], CLASSES),
        (lambda: [keras.metrics.CategoricalCrossentropy(name="m")], CLASSES),
        (list, CLASSES),
    ],
    ids=[
        "accuracy and mae",
        "auc",
        "auc by label",
        "rmse",
        "precision",
        "f1",
        "r2",
        "iou",
        "crossentropy",
        "loss alone",
    ],
)
def test_all_ranks_get_what_one_process_would(
    metrics: Callable[[], list[Any]], y: Any, weights: Any, cuts: list[int]
) -> None:
    expected = alone(metrics, y, weights)
    assert "loss" in expected
    for found in over_ranks(metrics, y, cuts, weights):
        assert found == pytest.approx(expected, rel=1e-5)


def test_a_metric_with_one_value_in_an_array_is_a_number() -> None:
    def metrics() -> list[Any]:
        return [keras.metrics.F1Score(name="m")]

    for found in over_ranks(metrics, BINARY, [7]):
        assert found == pytest.approx(alone(metrics, BINARY), rel=1e-5)


def test_a_metric_with_several_values_is_left_out() -> None:
    [found, _] = over_ranks(lambda: [keras.metrics.F1Score(name="m"), "mae"], CLASSES, [7])
    assert set(found) == {"loss", "mae"}


class Highest(keras.metrics.Metric):
    """The highest guess: a state that may not be added up."""

    def __init__(self, name: str = "highest") -> None:
        super().__init__(name=name)
        self.value = self.add_weight(name="value", initializer="zeros")

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        self.value.assign(keras.ops.maximum(self.value, keras.ops.max(y_pred)))

    def result(self) -> Any:
        return self.value


def test_a_metric_of_the_users_own_is_averaged_by_rows() -> None:
    parts = [evaluated(lambda: [Highest()], BINARY, rows).get_metrics_result() for rows in (slice(0, 7), slice(7, 11))]
    expected = (7 * float(parts[0]["highest"]) + 4 * float(parts[1]["highest"])) / 11
    for found in over_ranks(lambda: [Highest(), "mae"], BINARY, [7]):
        assert found["highest"] == pytest.approx(expected, rel=1e-6)
        assert found["mae"] == pytest.approx(alone(lambda: ["mae"], BINARY)["mae"], rel=1e-6)


def test_a_users_subclass_of_a_metric_of_keras_adds_up_like_it() -> None:
    class Area(keras.metrics.AUC):
        pass

    def metrics() -> list[Any]:
        return [Area(name="m")]

    for found in over_ranks(metrics, BINARY, [7]):
        assert found == pytest.approx(alone(metrics, BINARY), rel=1e-5)
