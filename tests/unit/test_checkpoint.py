"""Which epoch's model is kept, and what is left in the run's folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvdspark import Store
from hvdspark.errors import ParamError, StoreError
from hvdspark.runs import run_folder
from hvdspark.worker.checkpoint import BestOf, Checkpoints


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store")


def kept_epoch(store: Store, best_of: BestOf | None, epochs: Sequence[Mapping[str, float]]) -> int:
    """Save a model per epoch, whose bytes are the epoch's number, and return which one is published."""
    checkpoints = Checkpoints(store, "run", ".txt", best_of)
    for number, logs in enumerate(epochs):
        is_final = number + 1 == len(epochs)
        checkpoints.save(logs, lambda number=number: str(number).encode(), is_final=is_final)  # type: ignore[misc]
    return int(store.read_bytes(checkpoints.publish(lambda: str(len(epochs) - 1).encode())))


def losses(*values: float) -> list[dict[str, float]]:
    return [{"loss": 1.0, "val_loss": value} for value in values]


def test_without_a_metric_the_last_epoch_is_kept(store: Store) -> None:
    assert kept_epoch(store, None, losses(0.3, 0.1, 0.2)) == 2


def test_the_lowest_loss_is_kept(store: Store) -> None:
    assert kept_epoch(store, BestOf(), losses(0.3, 0.1, 0.2)) == 1


def test_of_equal_epochs_the_first_is_kept(store: Store) -> None:
    assert kept_epoch(store, BestOf(), losses(0.3, 0.1, 0.1)) == 1


def test_the_mode_decides_what_is_better(store: Store) -> None:
    epochs = losses(0.3, 0.1, 0.5, 0.2)
    assert kept_epoch(store, BestOf("val_loss", "max"), epochs) == 2
    assert kept_epoch(store, BestOf("val_loss", "min"), epochs) == 1


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([math.nan, 0.5, 0.7], 1),
        ([0.5, math.nan, 0.7], 0),
        ([0.5, math.nan, 0.3], 2),
        ([math.inf, 0.5], 1),
        ([0.5, -math.inf, math.nan], 1),
        ([math.nan, math.nan], 1),
    ],
)
def test_any_number_is_better_than_none(store: Store, values: list[float], expected: int) -> None:
    assert kept_epoch(store, BestOf(), losses(*values)) == expected


@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=8), st.sampled_from(["min", "max"]))
def test_the_epoch_that_is_kept_has_the_best_value(values: list[float], mode: str) -> None:
    best_of = BestOf("val_loss", mode)  # type: ignore[arg-type]
    best = min(values) if mode == "min" else max(values)
    assert kept_epoch(Store.create("memory://checkpoints"), best_of, losses(*values)) == values.index(best)


@pytest.mark.parametrize(
    "monitor",
    [
        "accuracy",
        "val_accuracy",
        "val_sparse_categorical_accuracy",
        "auc",
        "val_auc_1",
        "precision",
        "recall",
        "f1_score",
    ],
)
def test_scores_rise(monitor: str) -> None:
    assert BestOf(monitor).rising


@pytest.mark.parametrize(
    "monitor", ["loss", "val_loss", "mae", "val_root_mean_squared_error", "kl_divergence", "price_loss"]
)
def test_losses_and_errors_fall(monitor: str) -> None:
    assert not BestOf(monitor).rising


@pytest.mark.parametrize("monitor", ["val_accident_loss", "dice_loss", "val_precision_head_loss"])
def test_a_loss_falls_whatever_its_output_is_called(monitor: str) -> None:
    assert not BestOf(monitor).rising


def test_a_metric_that_the_fit_does_not_have_names_the_closest_and_those_there_are(store: Store) -> None:
    checkpoints = Checkpoints(store, "run", ".txt", BestOf("val_los"))
    with pytest.raises(ParamError, match=r"'val_los'.*Did you mean 'val_loss'\? It has: loss, val_loss") as caught:
        checkpoints.save({"loss": 1.0, "val_loss": 2.0}, lambda: b"x")
    assert caught.value.param == "checkpoint_callback"


def test_the_model_is_serialized_once_per_epoch(store: Store) -> None:
    calls = []
    checkpoints = Checkpoints(store, "run", ".txt", BestOf("loss"))
    for value in (2.0, 1.0, 3.0):
        checkpoints.save({"loss": value}, lambda: calls.append(1) or b"x")  # type: ignore[func-returns-value]
    assert len(calls) == 3
    checkpoints.save({"loss": 4.0}, lambda: calls.append(1) or b"x", is_final=True)  # type: ignore[func-returns-value]
    assert len(calls) == 3


def test_a_run_has_its_model_and_its_checkpoints_and_nothing_else(store: Store) -> None:
    assert kept_epoch(store, BestOf(), losses(0.1, 0.2)) == 0
    assert store.list(run_folder("run")) == ["checkpoints", "model.txt"]
    assert store.list(run_folder("run"), "checkpoints") == ["best.txt", "last.txt"]
    assert store.read_bytes(run_folder("run"), "checkpoints", "last.txt") == b"1"


def test_a_run_whose_last_model_is_kept_has_it_once(store: Store) -> None:
    assert kept_epoch(store, None, losses(0.1, 0.2)) == 1
    assert store.list(run_folder("run")) == ["checkpoints", "model.txt"]
    assert store.list(run_folder("run"), "checkpoints") == []


@pytest.mark.parametrize("best_of", [None, BestOf()])
def test_what_callbacks_make_of_the_model_at_the_end_is_the_last_one(store: Store, best_of: BestOf | None) -> None:
    checkpoints = Checkpoints(store, "run", ".txt", best_of)
    checkpoints.save({"val_loss": 1.0}, lambda: b"trained", is_final=True)
    published = store.read_bytes(checkpoints.publish(lambda: b"averaged"))
    assert published == (b"averaged" if best_of is None else b"trained")
    if best_of is not None:
        assert store.read_bytes(run_folder("run"), "checkpoints", "last.txt") == b"averaged"


def test_publishing_the_best_before_any_epoch_is_an_error_that_names_the_file(store: Store) -> None:
    with pytest.raises(StoreError, match=r"runs/run/checkpoints/best\.txt"):
        Checkpoints(store, "run", ".txt", BestOf()).publish(lambda: b"x")


def test_another_attempt_publishes_the_best_of_an_earlier_one(store: Store) -> None:
    Checkpoints(store, "run", ".txt", BestOf()).save({"val_loss": 1.0}, lambda: b"best", is_final=True)
    again = Checkpoints(store, "run", ".txt", BestOf())
    again.best_value = 1.0
    again.save({"val_loss": 2.0}, lambda: b"worse", is_final=True)
    assert store.read_bytes(again.publish(lambda: b"worse")) == b"best"


def test_an_epoch_whose_model_cannot_be_serialized_keeps_the_one_before(store: Store) -> None:
    checkpoints = Checkpoints(store, "run", ".txt", BestOf("loss"))
    checkpoints.save({"loss": 2.0}, lambda: b"first")

    def fail() -> bytes:
        raise RuntimeError("cannot")

    with pytest.raises(RuntimeError):
        checkpoints.save({"loss": 1.0}, fail)
    assert store.read_bytes(checkpoints.publish(lambda: b"second")) == b"first"


@pytest.fixture
def blocked(store: Store) -> Callable[[bool], None]:
    """Let nothing be written where checkpoints go, or let it again."""
    folder = Path(store.path(run_folder("run"), "checkpoints"))
    aside = folder.with_name("aside")

    def block(wanted: bool) -> None:
        if wanted:
            if folder.exists():
                folder.rename(aside)
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.write_bytes(b"in the way")
        else:
            folder.unlink()
            if aside.exists():
                aside.rename(folder)

    return block


def test_a_model_that_cannot_be_written_is_written_with_the_next_one(
    store: Store, blocked: Callable[[bool], None], caplog: pytest.LogCaptureFixture
) -> None:
    checkpoints = Checkpoints(store, "run", ".txt", BestOf("loss"))
    checkpoints.save({"loss": 3.0}, lambda: b"old")
    blocked(True)
    checkpoints.save({"loss": 1.0}, lambda: b"best")
    assert checkpoints.is_behind
    assert "the best model is kept in memory until it can be written: cannot write" in caplog.text
    blocked(False)
    checkpoints.save({"loss": 2.0}, lambda: b"worse")
    assert not checkpoints.is_behind
    folder = run_folder("run")
    assert store.read_bytes(folder, "checkpoints", "best.txt") == b"best"
    assert store.read_bytes(checkpoints.publish(lambda: b"worse")) == b"best"


@pytest.mark.parametrize("best_of", [None, BestOf("loss")])
def test_an_older_model_is_never_published_in_place_of_one_that_could_not_be_written(
    store: Store, blocked: Callable[[bool], None], best_of: BestOf | None
) -> None:
    checkpoints = Checkpoints(store, "run", ".txt", best_of)
    checkpoints.save({"loss": 3.0}, lambda: b"old")
    blocked(True)
    checkpoints.save({"loss": 1.0}, lambda: b"new")
    assert store.read_bytes(checkpoints.publish(lambda: b"new")) == b"new"


def test_a_model_that_cannot_be_published_is_an_error_that_says_how_to_go_on(store: Store, tmp_path: Path) -> None:
    checkpoints = Checkpoints(store, "run", ".txt")
    checkpoints.save({}, lambda: b"x")
    (tmp_path / "store" / run_folder("run") / "model.txt").mkdir()
    with pytest.raises(
        StoreError, match=r"^cannot write .*/model.txt: .*Is a directory.* run_id='run' goes on"
    ) as caught:
        checkpoints.publish(lambda: b"x")
    assert caught.value.url == store.url_of("runs/run/model.txt")
    assert store.list("runs/run") == ["checkpoints", "model.txt"]
