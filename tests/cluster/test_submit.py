"""Jobs by spark-submit on a real cluster, seen from outside: exit codes, the line of JSON, what lies in the Store."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hvdspark.estimators.keras import codec
from standalone import SPARK_HOME, Cluster, wait_for

from hvdspark import Store
from hvdspark.aliases import read_alias
from hvdspark.runs import read_record

HERE = Path(__file__).parent
SUBMIT = HERE.parents[1] / "examples/submit"

pytestmark = pytest.mark.timeout(900)  # each spark-submit starts two JVMs and two ranks

CONFIG = """
input: {path: DATA}
pipeline: job_features:stages
estimator:
  model: job_features:network
  model_args: {units: 16}
  loss: mse
  optimizer: {class_name: Adam, config: {learning_rate: 1e-2}}
  metrics: [mae]
  feature_cols: [scaled]
  label_cols: [y]
  output_cols: [prediction]
  num_proc: 2
  batch_size: 32
  epochs: 5
  validation: 0.1
  backend_env: {JOB_MARK: HELD}
evaluation: {fraction: 0.2, metrics: [RootMeanSquaredError]}
promote_if: val_loss < current * 0.99
"""


@dataclass
class Done:
    """What a spark-submit came to."""

    code: int
    result: dict[str, Any]
    log: str


@dataclass
class Site:
    """Where the jobs of this module run: a folder with the data, the configuration and the Store."""

    cluster: Cluster
    folder: Path

    @property
    def store(self) -> Store:
        return Store.create(self.folder / "store")

    @property
    def mark(self) -> Path:
        return self.folder / "mark"

    def train(self, options: list[str], *arguments: str) -> list[str]:
        config = ["--config", str(self.folder / "job.yaml"), "--store", self.store.url]
        return self.command(options, "hvdspark_job.py", *config, *arguments)

    def command(self, options: list[str], program: str, *arguments: str) -> list[str]:
        settings = ["spark.ui.enabled=false", "spark.ui.showConsoleProgress=false", "spark.executor.memory=1g"]
        settings += ["spark.sql.shuffle.partitions=2", "spark.driver.host=127.0.0.1"]
        conf = [part for setting in settings for part in ("--conf", setting)]
        submit = [str(SPARK_HOME / "bin/spark-submit"), "--master", self.cluster.url]
        return [*submit, *conf, *options, str(SUBMIT / program), *arguments]

    def start(self, command: list[str], log: Path) -> subprocess.Popen[str]:
        # Nothing of the checkout's environment may help.
        hidden = ("PYTHONPATH", "PYSPARK_PYTHON", "PYSPARK_DRIVER_PYTHON", "VIRTUAL_ENV")
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        with log.open("w") as file:
            return subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=file, text=True, cwd=self.folder, env=environment
            )

    def run(self, command: list[str]) -> Done:
        log = self.folder / "log"
        with self.start(command, log) as process:
            output, _ = process.communicate()
        lines = output.splitlines()
        assert lines, log.read_text()[-4000:]
        return Done(process.returncode, json.loads(lines[-1]), log.read_text())

    def weights(self, run_id: str) -> list[np.ndarray]:
        model = codec.model_from_bytes(self.store.read_bytes("runs", run_id, "model.keras"), compiled=False)
        return [np.asarray(weight) for weight in model.weights]


@pytest.fixture(scope="module")
def site(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Site:
    found = Site(cluster, tmp_path_factory.mktemp("site"))
    random = np.random.default_rng(5)
    x = random.normal(size=(2_000, 3))
    y = x[:, 0] - 2 * x[:, 1] + x[:, 2] ** 2
    table = pa.table({"a": x[:, 0], "b": x[:, 1], "c": x[:, 2], "y": y})
    pq.write_table(table, found.folder / "rows.parquet")
    config = CONFIG.replace("DATA", str(found.folder / "rows.parquet")).replace("HELD", str(found.mark))
    (found.folder / "job.yaml").write_text(config)
    shutil.copy(HERE / "job_features.py", found.folder)
    return found


@pytest.fixture(scope="module")
def by_zip(package: Path, bare_python: Path) -> list[str]:
    """Options by which hvdspark travels as a zip, to interpreters that do not know it."""
    return ["--py-files", str(package), "--conf", f"spark.pyspark.python={bare_python}"]


@pytest.fixture(scope="module")
def by_archive(packed: tuple[Path, Path]) -> list[str]:
    """Options by which a whole environment travels."""
    python, archive = packed
    return [
        *("--archives", f"{archive}#env"),
        *("--conf", "spark.pyspark.python=./env/bin/python"),
        *("--conf", f"spark.pyspark.driver.python={python}"),
    ]


@pytest.fixture(scope="module")
def undisturbed(site: Site, by_zip: list[str]) -> Done:
    """The job run without a fault, hvdspark sent as a zip."""
    return site.run(site.train(by_zip, "--run-id", "undisturbed"))


def test_a_job_trains_and_promotes_and_its_champion_scores(site: Site, by_zip: list[str], undisturbed: Done) -> None:
    assert undisturbed.code == 0, (undisturbed.result, undisturbed.log[-2000:])
    result = undisturbed.result
    assert (result["state"], result["exit_code"], result["promoted"]) == ("finished", 0, True)
    # The variance of the label is 7.
    assert result["metrics"]["val_loss"] < 3
    assert result["metrics"]["val_RootMeanSquaredError"] ** 2 == pytest.approx(result["metrics"]["val_loss"], rel=1e-4)
    assert site.store.read_json("runs", "undisturbed", "result.json") == result
    champion = read_alias(site.store, "champion")
    assert champion is not None
    assert (champion.run_id, champion.model, champion.metrics) == ("undisturbed", result["model"], result["metrics"])

    trained = read_record(site.store, "undisturbed")
    again = site.run(site.train(by_zip, "--run-id", "undisturbed"))
    assert (again.code, again.result) == (0, result)
    assert read_record(site.store, "undisturbed") == trained

    output = site.folder / "scored"
    rows = ["--input", str(site.folder / "rows.parquet"), "--output", str(output), "--columns", "y,prediction"]
    model = ["--model", "alias:champion", "--store", site.store.url]
    scored = site.run(site.command(by_zip, "hvdspark_score.py", *model, *rows))
    assert scored.code == 0, (scored.result, scored.log[-2000:])
    assert (scored.result["run_id"], scored.result["rows"]) == ("undisturbed", 2_000)
    table = pq.read_table(output)
    error = np.mean((table["y"].to_numpy() - table["prediction"].to_numpy()) ** 2)
    assert error == pytest.approx(result["metrics"]["val_loss"], rel=0.5)


def test_a_killed_driver_and_the_same_command_give_the_same_model_which_is_no_better(
    site: Site, by_archive: list[str], undisturbed: Done
) -> None:
    command = site.train(by_archive, "--run-id", "killed", "--set", "estimator.callbacks=job_features:hold")
    log = site.folder / "killed.log"
    with site.start(command, log) as process:
        try:
            wait_for(lambda: site.mark.exists() or process.poll() is not None, "the third epoch", 600)
            assert site.mark.exists(), process.communicate()
            # Spark's scripts may have left children of their own that nobody has waited for.
            children = psutil.Process(process.pid).children()
            (driver,) = [child for child in children if child.status() != psutil.STATUS_ZOMBIE]
            driver.kill()
            # What spark-submit makes of it: 128 + SIGKILL.
            assert process.wait(60) == 137
        finally:
            process.kill()
    record = read_record(site.store, "killed")
    assert record is not None
    assert record.state == "interrupted"

    done = site.run(command)
    assert done.code == 0, (done.result, done.log[-2000:])
    assert (done.result["state"], done.result["promoted"]) == ("finished", False)
    assert done.result["metrics"]["val_loss"] == pytest.approx(undisturbed.result["metrics"]["val_loss"], rel=1e-3)
    assert done.result["champion"] == {"run_id": "undisturbed", "metrics": undisturbed.result["metrics"]}
    assert "is not <" in done.result["cause"]
    champion, candidate = (read_alias(site.store, name) for name in ("champion", "candidate"))
    assert champion is not None
    assert candidate is not None
    assert (champion.run_id, candidate.run_id) == ("undisturbed", "killed")
    assert b"going on from the checkpoint at epoch 3" in site.store.read_bytes(
        "runs", "killed", "logs", "attempt-2", "rank-0.log"
    )
    for mine, theirs in zip(site.weights("killed"), site.weights("undisturbed"), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-5)


def test_rows_that_are_not_there_are_bad_data_to_a_scheduler(site: Site, by_archive: list[str]) -> None:
    # It comes to no executors.
    options = [*by_archive, "--master", "local[1]"]
    done = site.run(site.train(options, "--run-id", "absent", "--set", "input.path=/nowhere/rows.parquet"))
    assert done.code == done.result["exit_code"] == 65
    assert "/nowhere/rows.parquet" in done.result["cause"]
    assert site.store.read_json("runs", "absent", "result.json") == done.result
