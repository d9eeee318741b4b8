"""The operator, with a real ``spark-submit`` of a program that ends as it is told to."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from airflow_home import Airflow
from standalone import Cluster, wait_for

from hvdspark import Store

HERE = Path(__file__).resolve().parent

pytestmark = pytest.mark.timeout(600)


@pytest.fixture
def outcomes(home: Path, airflow_python: Path, tmp_path: Path) -> Callable[[str], Airflow]:
    shutil.copy(HERE / "dags" / "outcomes.py", home / "dags")
    variables = {
        "OUTCOMES": str(tmp_path),
        "AIRFLOW_VAR_FOLDER": str(tmp_path),
        "JOB": str(HERE / "jobs" / "outcome.py"),
    }
    return lambda master: Airflow(airflow_python, home, master, variables)


def test_how_the_command_ends_decides_what_becomes_of_the_task(
    outcomes: Callable[[str], Airflow], tmp_path: Path
) -> None:
    ended = outcomes("local[1]").run("outcomes", "2026-11-27")
    messages: dict[str, list[str]] = {}
    for line in (tmp_path / "messages").read_text().splitlines():
        task, message = json.loads(line)
        messages.setdefault(task, []).append(message)
    assert {name: (task.state, task.tries) for name, task in ended.tasks.items()} == {
        "bad.data": ("failed", 1),  # another try would fail as well
        "misconfigured": ("failed", 1),
        "again": ("success", 3),
        "silent": ("success", 2),
    }, ended.log
    again, silent = ended.tasks["again"].xcom, ended.tasks["silent"].xcom
    assert again["state"] == "finished"
    assert again["metrics"] == {"val_loss": 0.5}
    # A retry is the same run, another task is another one.
    assert (tmp_path / again["run_id"]).read_text() == "xxx"
    assert again["run_id"].startswith("outcomes-again-manual__2026-")
    assert silent["run_id"] != again["run_id"]
    # The root cause comes first, and what failed is in the XCom too.
    assert messages["bad.data"][0].startswith("rank 1 on h: ValueError: no 65 ü (run outcomes-bad.data-")
    assert ended.tasks["bad.data"].xcom["exit_code"] == 65
    assert "Error code is: 3." in messages["again"][0]
    assert messages["again"][1].startswith("rank 1 on h: ValueError: no 75 ü")
    assert "there is no result of the run outcomes-silent-" in messages["silent"][0]


def test_a_task_that_is_ended_takes_its_spark_job_along(
    outcomes: Callable[[str], Airflow], cluster: Cluster, tmp_path: Path
) -> None:
    airflow = outcomes(cluster.url)
    pid = tmp_path / "pid"
    with airflow.running("hanging", "2026-11-27") as process:
        airflow.wait_for(lambda: pid.exists() and pid.read_text() != "", "the job", process)
        driver = psutil.Process(int(pid.read_text()))
        assert len(cluster.applications()) == 1
        process.terminate()  # as Airflow tells a task to end
        ended = airflow.ended(process, "hanging", "2026-11-27")
    assert ended.tasks["train"].state == "failed"
    assert not driver.is_running()
    # It had the time to say what becomes of its run.
    assert ended.tasks["train"].xcom["state"] == "interrupted"
    assert ended.tasks["train"].xcom["exit_code"] == 130
    wait_for(lambda: cluster.applications() == [], "the end of the Spark job", 20)


def test_names_of_runs_are_names_of_the_store_and_never_the_same(airflow_python: Path, home: Path) -> None:
    tasks = [
        ("retrain", "train", "scheduled__2026-11-27T00:00:00+00:00", -1),
        ("retrain", "train", "scheduled__2026-11-27T00:00:00-00:00", -1),
        ("retrain", "train", "scheduled__2026-11-28T00:00:00+00:00", -1),
        ("retrain-train", "x", "manual", -1),
        ("retrain", "train-x", "manual", -1),
        ("retrain.train", "x", "manual", -1),
        ("retrain", "train", "manual", 0),
        ("retrain", "train", "manual", 10),
        ("retrain", "train", "manual", -1),
        ("é" * 200, "train", "x" * 200, -1),
        ("é" * 200, "train", "x" * 201, -1),
        ("-", ".", "..", -1),
    ]
    names, imported = Airflow(airflow_python, home, "local[1]").evaluate(
        "import json, sys\nfrom types import SimpleNamespace as N\nfrom hvdspark.airflow import run_name\n"
        f"names = [run_name({{'ti': N(dag_id=d, task_id=t, map_index=m), 'dag_run': N(run_id=r)}})"
        f" for d, t, r, m in {tasks!r}]\n"
        "print(json.dumps([names, sorted(sys.modules)]))"
    )
    store = Store.create(home)
    assert len(set(names)) == len(tasks)
    assert names[0].startswith("retrain-train-scheduled__2026-11-27T00-00-00-00-00-")
    assert [store.path(name) for name in names] == [f"{home}/{name}" for name in names]
    assert max(map(len, names)) < 200
    # hvdspark was installed without what it depends on.
    assert {"pyspark", "py4j", "tensorflow", "keras", "horovod", "cloudpickle"} & set(imported) == set()
