"""Drivers that die when all is trained, and before they could say so: the model is taken, and not trained again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from faulty_fits import EPOCHS, Trained, assert_same, estimator, network, outcome
from hvdspark.estimators import KerasModel
from pyspark.ml import PipelineModel
from pyspark.sql import DataFrame, SparkSession

from hvdspark import Store, best_run, cli
from hvdspark.aliases import entry_of_run, read_alias
from hvdspark.errors import ParamError, RunInProgressError
from hvdspark.lease import held
from hvdspark.runs import read_record

HERE = Path(__file__).parent


pytestmark = pytest.mark.timeout(900)  # each driver is a Python and a Java of its own


@contextlib.contextmanager
def dying(folder: Path, *arguments: str) -> Iterator[None]:
    """Run a driver until it dies; at the end of the block it has, while what it started may end a while later."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
    with (folder / "log").open("w+") as log:
        driver = subprocess.Popen(
            [sys.executable, str(HERE / "dying_driver.py"), *arguments], env=environment, stdout=log, stderr=log
        )
        try:
            yield
            assert driver.wait(800) == -signal.SIGKILL, (folder / "log").read_text()[-4000:]
        finally:
            driver.kill()
            driver.wait()


@dataclass(frozen=True)
class Job:
    """A job's file and its Store."""

    path: Path
    store: Store

    def train(self, run_id: str) -> tuple[int, dict[str, Any]]:
        done = CliRunner().invoke(cli.main, self.command(run_id))
        return done.exit_code, json.loads(done.stdout.splitlines()[-1])

    def command(self, run_id: str) -> list[str]:
        return ["train", "--config", str(self.path), "--run-id", run_id]


def make_job(folder: Path) -> Job:
    store = Store.create(folder / "store")
    x = np.random.default_rng(5).normal(size=(400, 3))
    pq.write_table(pa.table({**dict(zip("abc", x.T, strict=True)), "y": x[:, 0] - x[:, 1]}), folder / "rows.parquet")
    network().save(folder / "network.keras")
    path = folder / "job.yaml"
    path.write_text(
        f"store: {store.url}\n"
        f"input: {{path: {folder}/rows.parquet}}\n"
        "estimator:\n"
        f"  {{model: {folder}/network.keras, loss: mse, feature_cols: [[a, b, c]], label_cols: [y], num_proc: 1,\n"
        "    epochs: 3, validation: 0.2, checkpoint_callback: val_loss, verbose: 0}\n"
        "evaluation: {fraction: 0.2}\n"
        "promote_if: val_loss < current\n"
        "spark: {spark.master: 'local[2]', spark.ui.enabled: false, spark.driver.host: 127.0.0.1}\n"
    )
    return Job(path, store)


@dataclass(frozen=True)
class Died:
    """What drivers left that died when their model, of the run ``night``, was published: that of a fit, and a job's."""

    store: Store
    job: Job


@pytest.fixture(scope="module")
def died(tmp_path_factory: pytest.TempPathFactory) -> Died:
    fit, job = tmp_path_factory.mktemp("fit"), tmp_path_factory.mktemp("job")
    found = Died(Store.create(fit / "store"), make_job(job))
    # At the same time, for most of theirs is that of starting Python and Java.
    with dying(fit, "fit", found.store.url, "night"), dying(job, *found.job.command("night")):
        pass
    return found


def test_a_fit_takes_what_was_trained_for_a_driver_that_died(
    df: DataFrame, died: Died, undisturbed: Trained, tmp_path: Path
) -> None:
    store = died.store
    before = read_record(store, "night")
    assert before is not None
    assert (before.state, before.cause, dict(before.artefacts)) == ("interrupted", "its driver is gone", {})
    with pytest.raises(ParamError, match="'night' was trained with epochs=4, and now it is 5; give another run_id"):
        estimator(store, run_id="night", epochs=5).fit(df)
    with held(store, "runs/night", "job"), pytest.raises(RunInProgressError, match="run_id='night' is being trained"):
        estimator(store, run_id="night").fit(df)

    # How it is scored and launched may be another way; and so may be the number of ranks, for which there is no room.
    model = estimator(store, run_id="night", num_proc=64, transform_batch_size=7).fit(df)
    assert_same(outcome(model), undisturbed)
    assert [epoch.epoch for epoch in model.epochs] == list(range(1, EPOCHS + 1))
    model.write().save(str(tmp_path / "model"))
    assert KerasModel.load(str(tmp_path / "model")).summary() == model.summary()
    assert str(model.summary()).count("\n") == EPOCHS

    record = read_record(store, "night")
    assert record is not None
    assert (record.state, record.cause, record.epoch) == ("finished", None, EPOCHS)
    assert record.metrics == pytest.approx({name: values[-1] for name, values in undisturbed[0].items()}, rel=1e-3)
    assert record.artefacts["model"] == "runs/night/model.keras"
    assert (record.params, record.data, record.hosts) == (before.params, before.data, before.hosts)
    assert [attempt.ranks for attempt in record.attempts] == [2]
    with pytest.raises(ParamError, match=r"run_id='night' exists already .* and is finished"):
        estimator(store, run_id="night").fit(df)


def test_a_job_takes_what_was_trained_for_a_driver_that_died(spark: SparkSession, died: Died) -> None:
    job, store = died.job, died.job.store
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
