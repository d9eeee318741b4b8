"""TensorBoard's event files of a run: in a local Store at once, in another one published, and from there on show."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import keras
import numpy as np
import pytest
from click.testing import CliRunner
from hvdspark.estimators.keras.tensorboard import RunTensorBoard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from hvdspark import Store, cli
from hvdspark.cli.tensorboard import copy_new
from hvdspark.worker.reporter import Reporter

PLACE = "runs/a/tensorboard"


@pytest.fixture(params=["local", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    found = Store.create(tmp_path / "store" if request.param == "local" else f"memory://{uuid.uuid4().hex}")
    found.make_folder("runs/a")
    yield found
    if request.param == "memory":
        found.delete("runs")


def fit(store: Store, epochs: int) -> keras.callbacks.History:
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse", jit_compile=False)
    x = np.random.default_rng(0).normal(size=(32, 2))
    y = x.sum(axis=1)
    with Reporter(store, "a", lambda: None) as reporter:
        callback = RunTensorBoard(store, "a", reporter)
        return model.fit(x, y, validation_data=(x, y), epochs=epochs, verbose=0, callbacks=[callback])


def scalars(folder: Path, name: str) -> list[float]:
    events = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    events.Reload()
    return [float(make_ndarray(point.tensor_proto)) for point in events.Tensors(name)]


def test_they_hold_the_history_wherever_the_store_is(store: Store, tmp_path: Path) -> None:
    history = fit(store, 3).history
    target, sizes = tmp_path / "copy", dict[str, int]()
    target.mkdir()
    copy_new(store, PLACE, target, sizes)
    for part, name in (("train", "loss"), ("validation", "val_loss")):
        assert scalars(target / part, "epoch_loss") == pytest.approx(history[name])
    assert sorted(sizes) == sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())

    # What has grown is read on from where it was, and nothing twice.
    (path,) = (target / "train").iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    copy_new(store, PLACE, target, sizes)
    assert path.read_bytes() == whole[:100]
    sizes["train/" + path.name] = 100
    copy_new(store, PLACE, target, sizes)
    assert path.read_bytes() == whole


def test_where_they_cannot_be_written_the_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = Store.create(tmp_path / "store")
    store.publish_bytes(b"in the way", PLACE)
    assert len(fit(store, 3).history["loss"]) == 3
    (told,) = [text for entry in caplog.records if "event files" in (text := entry.getMessage())]
    assert told.startswith("no more event files for TensorBoard: ")


def test_a_run_without_them_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.main, ["tensorboard", "--run", "a", "--store", str(tmp_path)])
    assert result.exit_code == 1
    assert f"there are no event files in {tmp_path}/{PLACE}; fit with tensorboard=True" in result.stderr
