"""What a real fit leaves in the registry, and in MLflow: one that fails half-way, and goes on under the same name."""

from __future__ import annotations

import importlib.metadata
import json
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import keras
import mlflow
import numpy as np
import pytest
from click.testing import CliRunner
from hvdspark.estimators import BestOf, KerasEstimator, KerasModel
from pyspark.sql import DataFrame, SparkSession

from hvdspark import Store, compare_runs, list_runs, show_run
from hvdspark.cli import main
from hvdspark.errors import WorkerFailedError
from hvdspark.runs import RunRecord, read_record

ROWS, EPOCHS = 400, 3
SECRET = "not-for-the-record"


class FailsIn(keras.callbacks.Callback):
    """Raises when an epoch begins and MLflow has all before it, unless a file says that it has done so."""

    def __init__(self, epoch: int, mark: Path, database: Path) -> None:
        super().__init__()
        self._epoch = epoch
        self._mark = mark
        self._database = database

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == self._epoch and not self._mark.exists():
            deadline = time.monotonic() + 30
            while (logged := self._logged()) < epoch:
                assert time.monotonic() < deadline, f"MLflow has {logged} epochs while {epoch} have ended"
                time.sleep(0.2)
            raise RuntimeError("the user's own mistake")

    def _logged(self) -> int:
        """Count the epochs that MLflow has a loss of."""
        with closing(sqlite3.connect(self._database)) as database:
            [(count,)] = database.execute("SELECT count(*) FROM metrics WHERE key = 'loss'")
        return int(count)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store.create(tmp_path_factory.mktemp("records") / "store")


@pytest.fixture(scope="module")
def df(spark: SparkSession) -> DataFrame:
    x = np.random.default_rng(0).normal(size=(ROWS, 2))
    rows = [(float(a), float(b), float(2 * a - b)) for a, b in x]
    return spark.createDataFrame(rows, "a double, b double, y double")


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mlflow")


@pytest.fixture(scope="module")
def experiment(tracking: Path) -> Iterator[str]:
    """A tracking store of MLflow's, as a user sets it up."""
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tracking}/mlflow.db")
    yield mlflow.create_experiment("retraining", artifact_location=f"file://{tracking}/artifacts")
    mlflow.set_tracking_uri(before)


Fitted = tuple[RunRecord, RunRecord, KerasModel]


@pytest.fixture(scope="module")
def fitted(df: DataFrame, store: Store, experiment: str, tracking: Path) -> Fitted:
    """A fit that failed in its third epoch, when MLflow had two; the same gone on with, and the model."""
    mlflow.set_experiment(experiment_id=experiment)
    mark = tracking / "mark"
    keras.utils.set_random_seed(1)
    estimator = KerasEstimator(
        num_proc=2,
        store=store,
        model=keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)]),
        optimizer=keras.optimizers.Adam(0.05),
        loss="mse",
        metrics=["mae"],
        feature_cols=[["a", "b"]],
        label_cols=["y"],
        batch_size=32,
        epochs=EPOCHS,
        validation=0.25,
        checkpoint_callback=BestOf("val_loss"),
        callbacks=[FailsIn(2, mark, tracking / "mlflow.db")],
        backend_env={"TOKEN": SECRET, "UCX_NET_DEVICES": "lo"},
        run_id="nightly",
        mlflow=True,
        verbose=0,
    )
    with pytest.raises(WorkerFailedError, match="the user's own mistake"):
        estimator.fit(df)
    failed = read_record(store, "nightly")
    assert failed is not None
    assert mlflow.get_run(str(failed.mlflow_run_id)).info.status == "FAILED"
    mark.touch()
    model = estimator.fit(df)
    finished = read_record(store, "nightly")
    assert finished is not None
    return failed, finished, model


def test_a_run_that_failed_has_all_that_was_known_by_then(fitted: Fitted) -> None:
    failed, _, _ = fitted
    assert failed.state == "failed"
    assert "the user's own mistake" in str(failed.cause)
    assert [attempt.cause for attempt in failed.attempts] == [failed.cause]
    assert failed.data["rows"] + failed.data["val_rows"] == ROWS
    assert [place.rank for place in failed.hosts] == [0, 1]
    assert {"check", "write", "launch"} <= set(failed.phases)


def test_a_run_that_finished_can_be_understood_and_repeated_from_its_record(
    fitted: Fitted, df: DataFrame, store: Store
) -> None:
    failed, record, model = fitted
    assert (record.state, record.cause, record.kind) == ("finished", None, "keras")
    assert record.started <= float(record.ended or 0)
    assert record.began == failed.attempts[0].started
    assert [attempt.cause for attempt in record.attempts] == [failed.cause, None]
    assert all(attempt.ranks == 2 and attempt.ended for attempt in record.attempts)

    assert record.params["optimizer"]["class"] == "Adam"
    assert record.params["optimizer"]["learning_rate"] == pytest.approx(0.05)
    assert record.params["model"]["weights"] == 3
    expected = {"epochs": EPOCHS, "num_proc": 2, "batch_size": 32, "loss": "mse", "validation": 0.25, "shuffle": True}
    assert {name: record.params[name] for name in expected} == expected
    assert record.params["backend_env"] == ["TOKEN", "UCX_NET_DEVICES"]
    assert SECRET not in store.read_bytes("runs", "nightly", "run.json").decode()
    assert record.versions["keras"] == keras.__version__
    assert record.versions["tensorflow"] == importlib.metadata.version("tensorflow-cpu")

    assert record.data["fingerprint"] == failed.data["fingerprint"]
    assert store.exists(record.data["dataset"], "manifest.json")
    assert [column["name"] for column in record.data["columns"]] == ["a", "b", "y"]
    hosts = {place.host for place in record.hosts}
    assert [(place.rank, place.local_rank) for place in record.hosts] == [(0, 0), (1, 1)]
    assert len(hosts) == 1
    assert record.network == failed.network
    assert record.network.startswith("controller gloo (as asked for), TCP over lo; FI_TCP_IFACE=lo NCCL_IB_DISABLE=1 ")
    assert "UCX_NET_DEVICES" not in record.network, "the user's own value is the user's business"
    assert record.phases == pytest.approx(model.phases)
    assert store.exists(record.artefacts["model"])

    history = model.getHistory()
    best = int(np.argmin(history["val_loss"]))
    assert record.epoch == best + 1
    assert record.metrics == pytest.approx({name: values[best] for name, values in history.items()})
    assert list_runs(store) == [record]


def test_the_run_is_shown_and_compared(fitted: Fitted, df: DataFrame, store: Store) -> None:
    _, record, _ = fitted
    assert show_run(store, "nightly").record == record
    shown = CliRunner().invoke(main, ["runs", "list", "--store", store.url, "--json"])
    assert [found["run_id"] for found in json.loads(shown.stdout)] == ["nightly"]
    store.publish_bytes(json.dumps({**record.to_json(), "versions": {"keras": "3.0"}}).encode(), "runs/other/run.json")
    assert set(compare_runs(store, ["nightly", "other"]).versions["keras"].values()) == {keras.__version__, "3.0"}
    store.delete("runs", "other")


def test_mlflow_has_parameters_metrics_of_every_epoch_and_a_model_that_it_loads(
    fitted: Fitted, experiment: str, store: Store
) -> None:
    failed, record, model = fitted
    assert record.mlflow_run_id == failed.mlflow_run_id
    client = mlflow.MlflowClient()
    [run] = client.search_runs([experiment])
    assert run.info.run_id == record.mlflow_run_id
    assert (run.info.status, run.info.run_name) == ("FINISHED", "nightly")
    assert run.data.params["epochs"] == str(EPOCHS)
    assert run.data.params["optimizer.class"] == "Adam"
    assert SECRET not in str(run.data)
    assert run.data.tags["hvdspark.run_id"] == "nightly"
    for name, values in model.getHistory().items():
        found = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, name)}
        assert [found[epoch + 1] for epoch in range(EPOCHS)] == pytest.approx(values)
    loaded = mlflow.keras.load_model(f"runs:/{run.info.run_id}/model")
    for mine, other in zip(model.getModel().get_weights(), loaded.get_weights(), strict=True):
        np.testing.assert_array_equal(mine, other)
    assert mlflow.active_run() is None
