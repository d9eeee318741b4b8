"""An installation of Airflow, to run DAGs in and see how they ended."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from standalone import SPARK_HOME, wait_for

# Airflow takes ten seconds to begin with a DAG, and minutes on a machine that is busy otherwise.
_PATIENCE_S = 500


@dataclass(frozen=True)
class TaskRun:
    """How a task of a DAG run ended."""

    state: str
    tries: int
    xcom: Any
    xcoms: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """How a DAG run ended."""

    state: str
    run_id: str
    tasks: Mapping[str, TaskRun]
    log: str


@dataclass(frozen=True)
class Airflow:
    """An installation with a home and a database of its own.

    Parameters
    ----------
    python
        Its interpreter.
    home
        Its folder.
    master
        Where its connection ``spark_default`` leads.
    variables
        What its tasks find in the environment.
    """

    python: Path
    home: Path
    master: str
    variables: Mapping[str, str] = field(default_factory=dict)

    @contextlib.contextmanager
    def running(
        self, dag_id: str, date: str, conf: Mapping[str, Any] | None = None
    ) -> Iterator[subprocess.Popen[bytes]]:
        """Run a DAG with ``airflow dags test`` beside a block: one process runs its tasks one after the other."""
        options = [] if conf is None else ["--conf", json.dumps(conf)]
        with (
            self._log(dag_id, date).open("w") as log,
            subprocess.Popen(
                [str(self.python), "-m", "airflow", "dags", "test", dag_id, date, *options],
                env=self._environment(),
                cwd=self.home,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            ) as process,
        ):
            try:
                yield process
            finally:
                process.kill()

    def wait_for(self, condition: Callable[[], bool], what: str, process: subprocess.Popen[bytes]) -> None:
        """Wait until a condition holds while a DAG runs."""

        def found() -> bool:
            assert process.poll() is None, f"{what}: the DAG run ended first"
            return condition()

        wait_for(found, what, _PATIENCE_S)

    def run(self, dag_id: str, date: str, conf: Mapping[str, Any] | None = None) -> Ended:
        """Run a DAG; ``conf`` is what whoever triggers it gives along."""
        with self.running(dag_id, date, conf) as process:
            return self.ended(process, dag_id, date)

    def ended(self, process: subprocess.Popen[bytes], dag_id: str, date: str) -> Ended:
        """Wait for a DAG run, and read from the database how it ended."""
        process.wait(_PATIENCE_S)
        log = self._log(dag_id, date).read_text()
        with sqlite3.connect(self.home / "airflow.db") as database:
            row = database.execute(
                "SELECT state, run_id FROM dag_run WHERE dag_id = ? AND logical_date LIKE ?", (dag_id, f"{date}%")
            ).fetchone()
            assert row is not None, log
            state, run_id = row
            values: dict[str, dict[str, Any]] = {}
            for task, key, value in database.execute(
                "SELECT task_id, key, value FROM xcom WHERE run_id = ?", (run_id,)
            ):
                values.setdefault(task, {})[key] = json.loads(value)
            tasks = {
                task: TaskRun(state, tries, values.get(task, {}).get("return_value"), values.get(task, {}))
                for task, state, tries in database.execute(
                    "SELECT task_id, state, try_number FROM task_instance WHERE run_id = ?", (run_id,)
                )
            }
        database.close()
        return Ended(state, run_id, tasks, log)

    def evaluate(self, program: str) -> Any:
        """Run a program in its interpreter that prints JSON."""
        done = subprocess.run(
            [str(self.python), "-c", program], env=self._environment(), capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    def _log(self, dag_id: str, date: str) -> Path:
        return self.home / f"{dag_id}-{date}.log"

    def _environment(self) -> dict[str, str]:
        scheme, _, rest = self.master.rpartition("://")
        host, _, port = rest.partition(":") if scheme else (rest, "", "")
        connection = {"conn_type": "spark", "host": f"{scheme}://{host}" if scheme else host}
        if port:
            connection["port"] = port
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("AIRFLOW", "PYTHON"))}
        return {
            **kept,
            "AIRFLOW_HOME": str(self.home),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
            "AIRFLOW__CORE__UNIT_TEST_MODE": "false",
            "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "1",
            "AIRFLOW_CONN_SPARK_DEFAULT": json.dumps(connection),
            "SPARK_HOME": str(SPARK_HOME),
            "PATH": f"{SPARK_HOME / 'bin'}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYSPARK_PYTHON": sys.executable,
            "PYSPARK_DRIVER_PYTHON": sys.executable,
            **self.variables,
        }


def processes_of(home: Path) -> list[psutil.Process]:
    """List the processes of an installation, ``spark-submit`` and what it runs included."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if process.environ().get("AIRFLOW_HOME") == str(home):
                found.append(process)
    return found
