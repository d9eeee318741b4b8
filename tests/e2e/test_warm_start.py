"""A training that begins with the champion's weights: where its loss begins, on how many ranks, and when it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from click.testing import CliRunner
from hvdspark.estimators import KerasEstimator, KerasModel
from pyspark.sql import DataFrame, SparkSession

from hvdspark import Store, cli
from hvdspark.aliases import AliasEntry, entry_of_run, promote
from hvdspark.errors import ParamError, WorkerFailedError
from hvdspark.runs import read_record


class Broken(keras.callbacks.Callback):  # type: ignore[misc]
    """Raises an error at the beginning of an epoch."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self._at = epoch

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == self._at:
            raise RuntimeError("broken off")


def network(size: int = 8) -> keras.Model:
    keras.utils.set_random_seed(3)
    layers = [keras.layers.Dense(size, activation="tanh", name="wide"), keras.layers.Dense(1)]
    return keras.Sequential([keras.Input((3,)), *layers])


def estimator(store: Store, **overrides: Any) -> KerasEstimator:
    given: dict[str, Any] = {
        "num_proc": 1,
        "store": store,
        "model": network(),
        "optimizer": keras.optimizers.Adam(0.01),
        "loss": "mse",
        "feature_cols": [["a", "b", "c"]],
        "label_cols": ["y"],
        "batch_size": 64,
        "shuffle": False,
        "scale_learning_rate": False,
        "verbose": 0,
    }
    return KerasEstimator(**{**given, **overrides})


@pytest.fixture(scope="module")
def df(spark: SparkSession) -> DataFrame:
    x = np.random.default_rng(0).normal(size=(1280, 3))
    y = x @ [2.0, -1.0, 0.5] + 5
    return spark.createDataFrame(
        [(*map(float, row), float(label)) for row, label in zip(x, y, strict=True)], list("abcy")
    )


def assert_same_weights(one: KerasModel, other: KerasModel, tolerance: float = 0.0) -> None:
    for a, b in zip(one.getModel().get_weights(), other.getModel().get_weights(), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance / 10)


def test_a_fit_begins_where_the_champion_is_and_goes_on_from_its_own_state(store: Store, df: DataFrame) -> None:
    first = estimator(store, epochs=8, run_id="cold").fit(df)
    cold = first.getHistory()["loss"]
    promote(store, "champion", entry_of_run(store, "cold"))
    of_run = KerasModel.of_run(store, "cold")
    assert of_run.getHistory() == first.getHistory()
    assert of_run.transform(df).collect() == first.transform(df).collect()

    def fit(**overrides: Any) -> KerasModel:
        return estimator(store, epochs=2, warm_start="alias:champion", **overrides).fit(df)

    own = network()
    alone = fit(run_id="warm", model=own)
    assert alone.getHistory()["loss"][0] < 1.1 * cold[-1] < 0.2 * cold[0]
    together = fit(num_proc=2, batch_size=32)
    assert_same_weights(alone, together, tolerance=2e-5)
    np.testing.assert_allclose(alone.getHistory()["loss"], together.getHistory()["loss"], rtol=1e-5)
    for weight, before in zip(own.get_weights(), network().get_weights(), strict=True):
        np.testing.assert_array_equal(weight, before)
    note = store.read_json("runs", "warm", "warm_start.json") or {}
    assert (note["given"], note["run_id"]) == ("alias:champion", "cold")
    assert note["model"] == store.url_of("runs/cold/model.keras")
    assert store.read_bytes("runs/warm/checkpoints/start.keras") == first._data

    with pytest.raises(WorkerFailedError, match="broken off"):
        fit(run_id="broken", callbacks=[Broken(1)])
    # Another model is champion now, which is gone; the run has begun, and goes on with what it has.
    promote(store, "champion", AliasEntry("other", "/nowhere"))
    store.delete("runs", "cold")
    again = fit(run_id="broken")
    assert_same_weights(again, alone)
    assert again.getHistory() == alone.getHistory()
    record = read_record(store, "broken")
    assert record is not None
    assert record.state == "finished"

    with pytest.raises(ParamError, match=r"the layer 'wide' has weights of shape \(3, 9\), \(9,\) in the model, and"):
        estimator(store, model=network(9), warm_start="runs/warm", run_id="refused").fit(df)
    assert not store.exists("runs", "refused")


def test_every_night_a_job_begins_where_the_champion_is(store: Store, df: DataFrame, tmp_path: Path) -> None:
    df.write.parquet(str(tmp_path / "rows"))
    network().save(tmp_path / "network.keras")
    job = tmp_path / "job.yaml"
    job.write_text(
        f"store: {store.url}\n"
        f"input: {{path: {tmp_path}/rows}}\n"
        f"estimator: {{model: {tmp_path}/network.keras, loss: mse, batch_size: 64, num_proc: 1}}\n"
        "evaluation: {fraction: 0.2}\n"
        "promote_if: val_loss < current\n"
    )

    def train(run_id: str, alias: str, epochs: int) -> dict[str, Any]:
        values = {"feature_cols": [["a", "b", "c"]], "label_cols": ["y"], "epochs": epochs}
        values["optimizer"] = {"class_name": "Adam", "config": {"learning_rate": 0.01}}
        settings = [part for name, value in values.items() for part in ("--set", f"{name}={json.dumps(value)}")]
        command = ["train", "--config", str(job), "--run-id", run_id, "--warm-start", alias, *settings]
        done = CliRunner().invoke(cli.main, command)
        assert done.exit_code == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found

    # In the first night there is none.
    first = train("monday", "champion", 8)
    second = train("tuesday", "alias:champion", 1)
    assert first["promoted"]
    assert second["promoted"]
    assert second["training"]["loss"] < 1.1 * first["training"]["loss"]
    note = store.read_json("runs", "tuesday", "warm_start.json") or {}
    assert (note["given"], store.exists("runs", "monday", "warm_start.json")) == (first["model"], False)
