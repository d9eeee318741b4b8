"""The example's DAG, night after night, on a standalone cluster."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import yaml
from airflow_home import Airflow
from standalone import Cluster

from hvdspark import Store, aliases
from hvdspark.runs import log_folder, read_record

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
EPOCHS = 8

pytestmark = pytest.mark.timeout(900)


@dataclass(frozen=True)
class Nightly:
    """The DAG as it is installed, and what it works with."""

    airflow: Airflow
    store: Store
    folder: Path

    def epochs(self) -> list[list[int]]:
        """Return the epochs that were trained, by the process that trained them."""
        lines = [line.split() for line in (self.folder / "epochs").read_text().splitlines()]
        return [[int(epoch) for _, epoch in own] for _, own in groupby(lines, key=lambda line: line[0])]


@pytest.fixture
def nightly(home: Path, airflow_python: Path, cluster: Cluster, tmp_path: Path) -> Nightly:
    """Install the example, with a callback that can hold the training, and retries that come at once."""
    examples = tmp_path / "examples"
    for name in ("airflow", "submit"):
        shutil.copytree(ROOT / "examples" / name, examples / name)
    shutil.copy(HERE / "jobs" / "holding.py", examples / "airflow")
    job = examples / "airflow" / "job.yaml"
    values = yaml.safe_load(job.read_text())
    values["estimator"] |= {"callbacks": "holding:callbacks", "backend_env": {"HOLDING": str(tmp_path)}}
    values["estimator"]["epochs"] = EPOCHS
    job.write_text(yaml.safe_dump(values))
    dag = (examples / "airflow" / "retrain_dag.py").read_text()
    assert "timedelta(minutes=5)" in dag
    (home / "dags" / "retrain_dag.py").write_text(dag.replace("timedelta(minutes=5)", "timedelta(0)"))
    write_deliveries(tmp_path / "raw")
    variables = {
        "AIRFLOW_VAR_RETRAIN_FOLDER": str(examples / "airflow"),
        "AIRFLOW_VAR_RETRAIN_STORE": str(tmp_path / "store"),
        "AIRFLOW_VAR_RETRAIN_SOURCE": str(tmp_path / "raw"),
        "AIRFLOW_VAR_RETRAIN_DATA": str(tmp_path / "clean"),
    }
    return Nightly(Airflow(airflow_python, home, cluster.url, variables), Store.create(tmp_path / "store"), tmp_path)


def write_deliveries(folder: Path) -> None:
    """Write ten days of deliveries, some of them without a duration."""
    random = np.random.default_rng(7)
    size = 3000
    distance, items, hour = random.uniform(1, 20, size), random.integers(1, 9, size), random.integers(8, 22, size)
    minutes = 5 + 3 * distance + 2 * items + random.normal(0, 2, size)
    minutes[::50] = np.nan
    days = pd.date_range("2026-11-18", periods=10).date
    folder.mkdir()
    rows = {"day": days[np.arange(size) % 10], "distance_km": distance, "items": items, "hour": hour}
    pd.DataFrame({**rows, "minutes": minutes}).to_parquet(folder / "deliveries.parquet")


def kill_the_driver(airflow: subprocess.Popen[bytes]) -> None:
    """Kill ``spark-submit`` and the Python that it runs, as when their host goes down."""
    children = psutil.Process(airflow.pid).children(recursive=True)
    (group,) = {os.getpgid(child.pid) for child in children} - {os.getpgid(airflow.pid)}
    os.killpg(group, signal.SIGKILL)


def test_a_killed_try_goes_on_and_only_a_better_model_goes_into_production(nightly: Nightly) -> None:
    airflow, store = nightly.airflow, nightly.store
    hold = nightly.folder / "hold"
    hold.touch()
    with airflow.running("retrain", "2026-11-27") as process:
        airflow.wait_for((nightly.folder / "held").exists, "the fourth epoch", process)
        hold.unlink()
        kill_the_driver(process)
        first = airflow.ended(process, "retrain", "2026-11-27")

    assert first.state == "success", first.log
    assert {name: (task.state, task.tries) for name, task in first.tasks.items()} == {
        "extract": ("success", 1),
        "train": ("success", 2),
        "evaluate": ("success", 1),
        "promote": ("success", 1),
        "keep": ("skipped", 0),
        "gc": ("success", 1),
    }, first.log
    result = first.tasks["train"].xcom
    run_id = result["run_id"]
    assert result["promoted"] is True
    assert result["metrics"]["val_mae"] < 8  # minutes; a constant is off by 15
    # The second try was the same run, and went on after the last epoch that the first one had saved.
    before, after = nightly.epochs()
    assert before == [0, 1, 2, 3]
    assert after in ([3, 4, 5, 6, 7], [4, 5, 6, 7])
    record = read_record(store, run_id)
    assert record is not None
    assert record.state == "finished"
    assert store.list(log_folder(run_id, 2)) != []
    production = aliases.read_alias(store, "production")
    assert production is not None
    assert production.run_id == run_id
    assert first.tasks["promote"].xcom == {"run_id": run_id, "model": result["model"]}

    # What a dashboard or a mail takes.
    assert first.tasks["evaluate"].xcoms["metrics"] == {
        "run_id": run_id,
        "new": result["metrics"],
        "current_run_id": None,
        "current": {},
        "promoted": True,
    }

    # To be worse takes no second rank.
    second = airflow.run("retrain", "2026-11-28", {"overrides": {"epochs": 1, "learning_rate": 1e-6, "num_proc": 1}})
    assert second.state == "success", second.log
    assert {name: task.state for name, task in second.tasks.items()} == {
        "extract": "success",
        "train": "success",
        "evaluate": "success",
        "promote": "skipped",
        "keep": "success",
        "gc": "success",
    }, second.log
    worse = second.tasks["train"].xcom
    assert worse["run_id"] != run_id
    assert worse["promoted"] is False
    assert worse["champion"]["run_id"] == run_id
    # Both were compared on the newest day.
    assert worse["metrics"]["val_loss"] > worse["champion"]["metrics"]["val_loss"]
    assert "val_loss" in second.tasks["keep"].xcom
    assert second.tasks["evaluate"].xcoms["metrics"] == {
        "run_id": worse["run_id"],
        "new": worse["metrics"],
        "current_run_id": run_id,
        "current": worse["champion"]["metrics"],
        "promoted": False,
    }
    assert aliases.read_alias(store, "production") == production
