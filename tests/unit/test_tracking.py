"""Logging to MLflow: a real tracking store in SQLite, read back with MLflow's own client."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import mlflow
import numpy as np
import pytest
from hvdspark.estimators import KerasModel
from hvdspark.estimators.keras import codec
from hvdspark.estimators.tracking import MlflowTracking, require_mlflow, tracked
from standalone import wait_for

from hvdspark import Store
from hvdspark.errors import ParamError
from hvdspark.history import EpochRecord, write_history
from hvdspark.plan import TrainResult
from hvdspark.recording import Recording
from hvdspark.runs import RunRecord

HISTORY = {"loss": [0.5, 0.25], "val_loss": [0.75, float("nan")]}


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tracking store as a user sets it up; to make one takes a while."""
    folder = tmp_path_factory.mktemp("mlflow")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{folder}/mlflow.db")
    yield folder
    mlflow.set_tracking_uri(before)


@pytest.fixture
def experiment(tracking: Path, request: pytest.FixtureRequest) -> str:
    made = mlflow.create_experiment(request.node.name, artifact_location=f"file://{tracking}/artifacts")
    mlflow.set_experiment(experiment_id=made)
    return str(made)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store")


def recording(store: Store, run_id: str, **fields: Any) -> Recording:
    params = {"epochs": 2, "optimizer": {"class": "Adam", "learning rate": 0.1}, "odd#name": ["x" * 9000]}
    return Recording(store, RunRecord(run_id, "running", 1.0, params=params, versions={"keras": "3"}, **fields))


def trained() -> tuple[KerasModel, TrainResult]:
    keras.utils.set_random_seed(0)
    network = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    inputs, outputs = codec.describe(network)
    assert inputs is not None
    assert outputs is not None
    result = TrainResult(HISTORY, "runs/a/model.keras", {}, 1.0, 0.0, inputs, outputs)
    return KerasModel(codec.model_to_bytes(network), inputs, outputs, HISTORY), result


def values(run_id: str, name: str) -> dict[int, float]:
    return {found.step: found.value for found in mlflow.MlflowClient().get_metric_history(run_id, name)}


def test_a_fit_is_a_run_with_parameters_metrics_per_epoch_and_a_model_that_is_loaded_and_scored_by(
    store: Store, experiment: str, caplog: pytest.LogCaptureFixture
) -> None:
    model, result = trained()
    note = recording(store, "a", data={"rows": 12, "columns": []})
    with tracked(note, store, is_wanted=True) as log:
        log.finish(result, model)
    assert [found.getMessage() for found in caplog.records if found.name.startswith("hvdspark")] == []
    [run] = mlflow.MlflowClient().search_runs([experiment])
    assert run.info.run_id == note.record.mlflow_run_id
    assert (run.info.run_name, run.info.status) == ("a", "FINISHED")
    assert run.data.params["optimizer.learning rate"] == "0.1"
    assert run.data.params["odd_name"].startswith("['xxx")
    assert {name: run.data.tags[name] for name in ("hvdspark.run_id", "hvdspark.store", "data.rows")} == {
        "hvdspark.run_id": "a",
        "hvdspark.store": store.url,
        "data.rows": "12",
    }
    assert values(run.info.run_id, "loss") == {1: 0.5, 2: 0.25}
    assert np.isnan(values(run.info.run_id, "val_loss")[2])
    rows = np.ones((4, 3), dtype="float32")
    loaded = mlflow.pyfunc.load_model(f"runs:/{run.info.run_id}/model")
    np.testing.assert_allclose(loaded.predict(rows), model.getModel().predict(rows, verbose=0))
    assert mlflow.active_run() is None


def test_a_fit_that_fails_is_a_failed_run_with_the_epochs_that_it_did(store: Store, experiment: str) -> None:
    write_history(store, "a", [EpochRecord(1, 100.0, 5.0, 10, 2.0, None, {"loss": 0.5}, None, ())])
    note = recording(store, "a")
    with pytest.raises(ValueError, match="mine"), tracked(note, store, is_wanted=True):
        raise ValueError("mine")
    [run] = mlflow.MlflowClient().search_runs([experiment])
    assert run.info.status == "FAILED"
    [metric] = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert (metric.step, metric.value, metric.timestamp) == (1, 0.5, 105_000)
    # The same run goes on there, as it does in the Store.
    again = recording(store, "a", mlflow_run_id=run.info.run_id)
    with pytest.raises(KeyboardInterrupt), tracked(again, store, is_wanted=True):
        raise KeyboardInterrupt
    [run] = mlflow.MlflowClient().search_runs([experiment])
    assert run.info.status == "KILLED"
    lost = recording(store, "a", mlflow_run_id="0" * 32)
    with tracked(lost, store, is_wanted=True):
        pass
    assert len(mlflow.MlflowClient().search_runs([experiment])) == 2


def epoch(number: int, loss: float, started: float | None = None) -> EpochRecord:
    return EpochRecord(number, started or 100.0 * number, 5.0, 10, 2.0, None, {"loss": loss}, 1.0, ())


def test_epochs_are_logged_as_they_end_and_again_where_they_were_trained_anew(store: Store, experiment: str) -> None:
    model, result = trained()
    with tracked(recording(store, "a"), store, is_wanted=True) as log:
        with log.following():
            [run] = mlflow.MlflowClient().search_runs([experiment])
            write_history(store, "a", [epoch(1, 0.5), epoch(2, 0.25)])
            wait_for(lambda: values(run.info.run_id, "loss") == {1: 0.5, 2: 0.25}, "MLflow's metrics", 30)
            write_history(store, "a", [epoch(1, 0.5), epoch(2, 0.125, started=1000.0)])
        # The block's last look is over, or came too late for the parting: what is left is logged at the end.
        log.finish(result, model)
    metrics = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert [(found.step, found.value, found.timestamp) for found in metrics] == [
        (1, 0.5, 106_000),
        (2, 0.25, 206_000),
        (2, 0.125, 1_006_000),
    ]


def test_epochs_that_mlflow_does_not_take_cost_one_warning_and_are_logged_later(
    store: Store, experiment: str, caplog: pytest.LogCaptureFixture
) -> None:
    client = mlflow.MlflowClient()
    with tracked(recording(store, "a"), store, is_wanted=True) as log:
        assert isinstance(log, MlflowTracking)
        [run] = client.search_runs([experiment])
        client.delete_run(run.info.run_id)
        write_history(store, "a", [epoch(1, 0.5)])
        log.update()
        log.update()
        assert caplog.text.count("a: MLflow did not take metrics") == 1
        client.restore_run(run.info.run_id)
        write_history(store, "a", [epoch(1, 0.5), epoch(2, 0.25)])
        log.update()
        assert values(run.info.run_id, "loss") == {1: 0.5, 2: 0.25}
    assert caplog.text.count("MLflow did not take") == 1


def test_the_users_own_run_is_logged_to_and_left_open_and_others_come_within_it(store: Store, experiment: str) -> None:
    notes = [recording(store, name) for name in ("first", "second")]
    with mlflow.start_run() as mine:
        for note in notes:
            with tracked(note, store, is_wanted=True):
                pass
            active = mlflow.active_run()
            assert active is not None
            assert active.info.run_id == mine.info.run_id
    assert notes[0].record.mlflow_run_id == mine.info.run_id
    second = mlflow.get_run(str(notes[1].record.mlflow_run_id))
    assert second.data.tags["mlflow.parentRunId"] == mine.info.run_id
    assert second.data.tags["hvdspark.run_id"] == "second"
    assert len(mlflow.MlflowClient().search_runs([experiment])) == 2


def test_what_mlflow_refuses_afterwards_costs_a_warning(
    store: Store, experiment: str, caplog: pytest.LogCaptureFixture
) -> None:
    with mlflow.start_run():
        mlflow.log_param("epochs", 99)
        with tracked(recording(store, "a"), store, is_wanted=True):
            pass
    assert "a: MLflow did not take parameters" in caplog.text


def test_a_server_that_does_not_answer_is_an_error_before_any_job(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("no folder")
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/file/mlflow.db")
    monkeypatch.setenv("MLFLOW_SQLALCHEMYSTORE_MAX_RETRIES", "1")
    try:
        with (
            pytest.raises(ParamError, match="does not begin a run"),
            tracked(recording(store, "a"), store, is_wanted=True),
        ):
            pytest.fail("the fit began")
    finally:
        mlflow.set_tracking_uri(before)


def test_without_mlflow_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ParamError, match=r"pip install --find-links dist 'hvdspark\[mlflow\]'") as caught:
        require_mlflow()
    assert caught.value.param == "mlflow"
