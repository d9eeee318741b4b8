"""Drivers that die when all is trained, and before they could say so: the model is taken, and not trained again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faulty_fits import EPOCHS, Trained, assert_same, estimator, network, outcome
from hvdspark.estimators import KerasModel
from pyspark.ml import PipelineModel
from pyspark.sql import DataFrame, SparkSession

from hvdspark import Store, best_run
from hvdspark.aliases import entry_of_run, read_alias
from hvdspark.errors import ParamError, RunInProgressError
from hvdspark.lease import held
from hvdspark.runs import read_record

HERE = Path(__file__).parent


pytestmark = pytest.mark.timeout(900)  # each driver is a Python and a Java of its own


def run(*command: str) -> tuple[int, str, str]:
    """Run a program to its own end: what it started may hold its output open for a while longer."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as log:
        program = [sys.executable, *command]
        done = subprocess.run(program, env=environment, stdout=output, stderr=log, text=True, check=False)
        output.seek(0)
        log.seek(0)
        return done.returncode, output.read(), log.read()[-4000:]


def dying(*arguments: str) -> None:
    code, _, log = run(str(HERE / "dying_driver.py"), *arguments)
    assert code == -signal.SIGKILL, log


@pytest.fixture(scope="module")
def died(df: DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A Store with a run whose driver died when the model was published."""
    store = Store.create(tmp_path_factory.mktemp("died") / "store")
    dying("fit", store.url, "night")
    return store


def test_a_fit_takes_what_was_trained_for_a_driver_that_died(
    df: DataFrame, died: Store, undisturbed: Trained, tmp_path: Path
) -> None:
    before = read_record(died, "night")
    assert before is not None
    assert (before.state, before.cause, dict(before.artefacts)) == ("interrupted", "its driver is gone", {})
    with pytest.raises(ParamError, match="'night' was trained with epochs=4, and now it is 5; give another run_id"):
        estimator(died, run_id="night", epochs=5).fit(df)
    with held(died, "runs/night", "job"), pytest.raises(RunInProgressError, match="run_id='night' is being trained"):
        estimator(died, run_id="night").fit(df)

    # How it is scored and launched may be another way; and so may be the number of ranks, for which there is no room.
    model = estimator(died, run_id="night", num_proc=64, transform_batch_size=7).fit(df)
    assert_same(outcome(model), undisturbed)
    assert [epoch.epoch for epoch in model.epochs] == list(range(1, EPOCHS + 1))
    model.write().save(str(tmp_path / "model"))
    assert KerasModel.load(str(tmp_path / "model")).summary() == model.summary()
    assert str(model.summary()).count("\n") == EPOCHS

    record = read_record(died, "night")
    assert record is not None
    assert (record.state, record.cause, record.epoch) == ("finished", None, EPOCHS)
    assert record.metrics == pytest.approx({name: values[-1] for name, values in undisturbed[0].items()}, rel=1e-3)
    assert record.artefacts["model"] == "runs/night/model.keras"
    assert (record.params, record.data, record.hosts) == (before.params, before.data, before.hosts)
    assert [attempt.ranks for attempt in record.attempts] == [2]
    with pytest.raises(ParamError, match=r"run_id='night' exists already .* and is finished"):
        estimator(died, run_id="night").fit(df)


@dataclass(frozen=True)
class Job:
    """A job's file and its Store."""

    path: Path
    store: Store

    def train(self, run_id: str, *arguments: str) -> tuple[int, dict[str, Any]]:
        code, output, log = run("-m", "hvdspark", *self.command(run_id, *arguments))
        assert output, log
        return code, json.loads(output.splitlines()[-1])

    def command(self, run_id: str, *arguments: str) -> list[str]:
        return ["train", "--config", str(self.path), "--run-id", run_id, *arguments]


@pytest.fixture
def job(store: Store, tmp_path: Path) -> Job:
    x = np.random.default_rng(5).normal(size=(400, 3))
    pq.write_table(pa.table({**dict(zip("abc", x.T, strict=True)), "y": x[:, 0] - x[:, 1]}), tmp_path / "rows.parquet")
    network().save(tmp_path / "network.keras")
    path = tmp_path / "job.yaml"
    path.write_text(
        f"store: {store.url}\n"
        f"input: {{path: {tmp_path}/rows.parquet}}\n"
        "estimator:\n"
        f"  {{model: {tmp_path}/network.keras, loss: mse, feature_cols: [[a, b, c]], label_cols: [y], num_proc: 1,\n"
        "    epochs: 3, validation: 0.2, checkpoint_callback: val_loss, verbose: 0}\n"
        "evaluation: {fraction: 0.2}\n"
        "promote_if: val_loss < current\n"
        "spark: {spark.master: 'local[2]', spark.ui.enabled: false, spark.driver.host: 127.0.0.1}\n"
    )
    return Job(path, store)


def test_a_job_takes_what_was_trained_for_a_driver_that_died(spark: SparkSession, job: Job) -> None:
    store = job.store
    dying(*job.command("night"))
    trained = store.read_bytes("runs/night/model.keras")
    record = read_record(store, "night")
    assert record is not None
    assert record.state == "interrupted"

    code, result = job.train("night")
    assert (code, result["state"], result["promoted"]) == (0, "finished", True)
    assert store.read_bytes("runs/night/model.keras") == trained
    assert not store.exists("runs/night/logs/attempt-2")
    model = PipelineModel.load(result["model"]).stages[-1]
    assert isinstance(model, KerasModel)
    assert [epoch.epoch for epoch in model.epochs] == [1, 2, 3]
    assert str(model.summary()).count("\n") == 3

    record = read_record(store, "night")
    assert record is not None
    best = int(np.argmin(model.getHistory()["val_loss"]))
    assert (record.state, record.epoch, len(record.attempts)) == ("finished", best + 1, 1)
    assert record.metrics == {name: values[best] for name, values in model.getHistory().items()}
    assert best_run(store, "val_loss").run_id == "night"
    champion = read_alias(store, "champion")
    assert champion is not None
    assert champion.run_id == entry_of_run(store, "night").run_id == "night"
