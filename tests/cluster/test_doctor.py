"""``hvdspark doctor`` on a standalone cluster whose workers are as they should be, and on one where they are not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner
from clusters import new_session
from pyspark.sql import SparkSession
from standalone import Cluster, wait_for

from hvdspark.cli import main
from hvdspark.launch.slots import count_slots

# What Spark takes where nobody says otherwise: whatever a worker's PATH has.
PYTHON = "python3"
# One that only the first worker has.
PYTHON_OF_ALPHA = "python-of-alpha"

# Machines that run tests are busy.
PATIENCE = ("--timeout", "240")

ALPHA, BETA, BARE, OLD = "127.0.0.1", "127.0.0.2", "127.0.0.3", "127.0.0.4"


class MixedCluster(Cluster):
    """A cluster of unequal workers, each on a host of its own: the loopback has many addresses."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.store = folder / "store"
        self.store.mkdir(parents=True)
        own = Path(sys.executable).parent
        venv.create(folder / "bare", with_pip=False)
        only_alphas = folder / "alphas"
        only_alphas.mkdir()
        (only_alphas / PYTHON_OF_ALPHA).write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (only_alphas / PYTHON_OF_ALPHA).chmod(0o700)
        packages = folder / "packages" / "cloudpickle-2.2.1.dist-info"
        packages.mkdir(parents=True)
        (packages / "METADATA").write_text("Metadata-Version: 2.1\nName: cloudpickle\nVersion: 2.2.1\n")
        self._environments = {
            ALPHA: {"PATH": _path(own, only_alphas)},
            BETA: {"PATH": _path(own)},
            BARE: {"PATH": _path(folder / "bare/bin")},
            OLD: {"PATH": _path(own), "PYTHONPATH": str(packages.parent)},
        }

    def add(self, *hosts: str) -> None:
        for host in hosts:
            self.start_worker(host, 1, "1g", host=host, environment=self._environments[host])

    def command(self, name: str, program: str) -> Sequence[str]:
        if name != BARE:
            return [program]
        # This host has a folder of its own where the others have the Store.
        as_root = [] if os.geteuid() == 0 else ["--map-root-user"]
        mounted = 'mount -t tmpfs none "$0" && exec "$@"'
        return ["unshare", *as_root, "--mount", "sh", "-c", mounted, str(self.store), program]


def _path(*folders: Path) -> str:
    return os.pathsep.join([*map(str, folders), os.environ["PATH"]])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, _environment: None) -> Iterator[MixedCluster]:
    with MixedCluster(tmp_path_factory.mktemp("doctor")) as cluster:
        cluster.add(ALPHA, BETA)
        cluster.wait_for_cores(2)
        yield cluster


@pytest.fixture(scope="module")
def broken(cluster: MixedCluster) -> Iterator[SparkSession]:
    """A session on three workers of which one is as it should be."""
    cluster.kill(BETA)
    cluster.add(BARE, OLD)
    wait_for(lambda: cluster_hosts(cluster) == {ALPHA, BARE, OLD}, "the workers")
    session = new_session(cluster.url, {"spark.executor.memory": "600m"})
    session.sparkContext.setLogLevel("OFF")
    wait_for(lambda: count_slots(session) == 3, "executors")
    yield session
    session.stop()


def cluster_hosts(cluster: Cluster) -> set[str]:
    workers = (cluster._state() or {}).get("workers", ())
    return {worker["host"] for worker in workers if worker["state"] == "ALIVE"}


def findings(answer: str) -> tuple[dict[str, Any], list[tuple[str, str, str, str]]]:
    """Read what the command prints; returns it, and the findings that are not good, without what to do."""
    found = json.loads(answer)
    bad = [one for one in found["findings"] if one["severity"] != "ok"]
    assert all(one["remedy"] for one in bad)
    return found, [(one["severity"], one["check"], one["where"].rpartition(" ")[2], one["found"]) for one in bad]


def test_a_cluster_that_is_well_is_found_so_and_measured(cluster: MixedCluster) -> None:
    command = [sys.executable, "-m", "hvdspark", "doctor", "--cluster", cluster.url, "--store", str(cluster.store)]
    options = [
        *PATIENCE,
        "--num-proc",
        "2",
        "--json",
        "--conf",
        "spark.executor.memory=600m",
        "--conf",
        f"spark.pyspark.python={PYTHON}",
    ]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, bad = findings(done.stdout)
    # How fast a busy machine is, is its own affair.
    assert [one for one in bad if one[1] != "allreduce"] == []
    assert {host.rpartition(" ")[2] for host in found["executors"]} == {ALPHA, BETA}
    well = {(one["check"], one["where"].rpartition(" ")[2]) for one in found["findings"]}
    checks = ("python", "packages", "horovod", "mpi", "cpus", "gpus", "rdma", "memory", "disk", "clock", "store")
    assert {(check, host) for check in checks for host in (ALPHA, BETA)} <= well
    assert {("slots", "cluster"), ("ports", "cluster"), ("tasks", "cluster")} <= well
    speed = found["allreduce"]
    assert (speed["controller"], speed["ranks"], speed["large_bytes"]) == ("gloo", 2, 16 << 20)
    assert 0 < speed["latency_s"] < speed["large_s"]
    assert list(cluster.store.iterdir()) == []


def test_all_that_is_wrong_with_a_cluster_is_found_at_once(
    cluster: MixedCluster, broken: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    # All executors are there, and the fourth is waited for in full.
    monkeypatch.setattr("hvdspark.doctor.examination._TOO_FEW_S", 1.0)
    broken.sparkContext.pythonExec = PYTHON
    result = CliRunner().invoke(main, ["doctor", "--store", str(cluster.store), "--num-proc", "4", *PATIENCE, "--json"])
    assert result.exit_code == 1, result.output
    found, bad = findings(result.stdout)
    assert len(found["executors"]) == 3
    assert ("error", "slots", "cluster", "needs 4 slots, the cluster can run 3 at once") in bad
    assert ("error", "store", BARE, f"does not see what the driver wrote in {cluster.store}") in bad
    assert ("error", "horovod", BARE, "Horovod cannot be loaded: ModuleNotFoundError: No module named 'horovod'") in bad
    missing = {text.partition(" ")[0] for *_, host, text in bad if host == BARE and "is not installed" in text}
    assert {"hvdspark", "pyarrow", "psutil", "tensorflow"} <= missing
    assert "pyspark" not in missing
    [(*kind, text)] = [one for one in bad if one[2] == OLD]
    assert kind == ["error", "packages", OLD]
    assert text.startswith("cloudpickle 2.2.1, and the driver has ")
    assert [one for one in bad if one[2] == ALPHA] == []
    assert ("warning", "allreduce", "cluster", "was not measured, because of the errors above") in bad
    assert list(cluster.store.iterdir()) == []


def test_executors_that_run_no_python_task_are_reported_all_the_same(
    cluster: MixedCluster, broken: SparkSession
) -> None:
    broken.sparkContext.pythonExec = PYTHON_OF_ALPHA
    result = CliRunner().invoke(main, ["doctor", "--store", str(cluster.store), *PATIENCE, "--json"])
    assert result.exit_code == 1, result.output
    found, bad = findings(result.stdout)
    assert [one[:3] for one in bad if one[1] == "tasks"] == [("error", "tasks", "cluster")]
    silent = {host: text for severity, check, host, text in bad if check == "python"}
    assert set(silent) == {BARE, OLD}
    assert all(PYTHON_OF_ALPHA in text and "not found" in text for text in silent.values())
    # What could be asked has answered, the Store included.
    [alpha] = found["executors"].values()
    assert alpha["facts"]["horovod"]["value"]["built"]["gloo"] is True
    assert ("store", "ok", ALPHA) in {
        (one["check"], one["severity"], one["where"].rpartition(" ")[2]) for one in found["findings"]
    }


def test_a_cluster_that_is_not_there_is_one_finding(cluster: MixedCluster, broken: SparkSession) -> None:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    command = [sys.executable, "-m", "hvdspark", "doctor", "--cluster", "spark://127.0.0.1:1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    _, bad = findings(done.stdout)
    [(severity, check, _, text)] = bad
    assert (severity, check) == ("error", "session")
    assert text.startswith("no master answers at spark://127.0.0.1:1 (")
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before
