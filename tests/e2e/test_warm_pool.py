"""The warm pool on a real cluster: the same training, sooner, and nothing of it outlives what it serves."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from clusters import warm_parents
from pyspark.sql import SparkSession

import hvdspark
from hvdspark.errors import HvdSparkError
from hvdspark.launch.barrier import warm_up
from hvdspark.launch.options import LaunchOptions

OWN_SESSION = True

HOROVOD = ("tensorflow", "horovod.tensorflow")


def parents_and_sum() -> tuple[int, float]:
    import horovod.tensorflow as hvd
    import tensorflow as tf

    hvd.init()
    total = float(hvd.allreduce(tf.constant(float(hvd.rank() + 1)), op=hvd.Sum))
    return psutil.Process().parent().ppid(), total


def test_the_ranks_of_later_jobs_come_from_the_parents_of_the_first(spark: SparkSession) -> None:
    """Each executor has a parent of its own, whose forks run Horovod and TensorFlow as fresh processes do."""

    def change(batches: Iterable[Any]) -> Iterable[Any]:
        os.environ["CHANGED"] = "by another job that ran in the same Python"
        return batches

    runs = []
    for _ in range(3):
        runs.append(hvdspark.run(parents_and_sum, num_proc=2, preload=HOROVOD))
        spark.range(2, numPartitions=2).mapInArrow(change, "id long").collect()
    assert [total for ranks in runs for _, total in ranks] == [3.0] * 6
    parents = [{parent for parent, _ in ranks} for ranks in runs]
    assert len(parents[0]) == 2
    assert parents[0] == parents[1] == parents[2]
    names = {psutil.Process(parent).name() for parent in parents[0]}
    assert names == {"hvdspark-pool"}


def test_without_the_pool_every_rank_is_a_process_of_its_own(spark: SparkSession) -> None:
    def ancestors() -> list[str]:
        return [process.name() for process in psutil.Process().parents()]

    found = hvdspark.run(ancestors, num_proc=2, preload=["json"], warm_pool=False)
    assert not any("hvdspark-pool" in names for names in found)


def test_imports_ahead_do_not_wait_for_the_rows_of_many_partitions(spark: SparkSession) -> None:
    def slow(batches: Iterable[Any]) -> Iterable[Any]:
        time.sleep(0.3)
        return batches

    warm_up(spark, 2, LaunchOptions(preload=("json", "csv")))
    spark.range(20, numPartitions=20).mapInArrow(slow, "id long").collect()
    assert sum("csv" in parent.cmdline() for parent in warm_parents()) == 2


@pytest.fixture
def endless(spark: SparkSession, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """A job of two warm ranks that never ends on its own, and what it raises once somebody ends it."""

    def work(folder: str) -> None:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        pids = [os.getpid(), os.getppid(), child.pid]
        part = Path(folder) / f"{os.environ['HOROVOD_RANK']}.part"
        part.write_text(json.dumps({"rank": pids, "parent": psutil.Process().parent().ppid()}))
        part.rename(part.with_suffix(".pids"))
        time.sleep(600)

    raised: list[BaseException] = []

    def drive() -> None:
        try:
            hvdspark.run(work, (str(tmp_path),), num_proc=2, preload=["json"], spark=spark)
        except HvdSparkError as exc:
            raised.append(exc)

    driver = threading.Thread(target=drive)
    driver.start()
    wait_until(lambda: len(list(tmp_path.glob("*.pids"))) == 2)
    notes = [json.loads(path.read_text()) for path in tmp_path.glob("*.pids")]
    yield {
        "ranks": [psutil.Process(pid) for note in notes for pid in note["rank"]],
        "parents": [psutil.Process(note["parent"]) for note in notes],
        "raised": raised,
    }
    driver.join(timeout=60)
    assert not driver.is_alive()


def descendants(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # one that has just ended
            if mark in " ".join(process.cmdline()):
                found.append(process)
    return found


def test_killed_tasks_take_their_ranks_along_but_not_the_pool(spark: SparkSession, endless: dict[str, Any]) -> None:
    daemons = descendants("pyspark.daemon")  # tasks are forks of theirs, with the same command line
    for task in (process for process in daemons if process.parent() in daemons):
        task.kill()
    _, alive = psutil.wait_procs(endless["ranks"], timeout=10)
    assert alive == []
    assert all(parent.is_running() for parent in endless["parents"])
    wait_until(lambda: bool(endless["raised"]))
    again = hvdspark.run(lambda: psutil.Process().parent().ppid(), num_proc=2, preload=["json"])
    assert set(again) == {parent.pid for parent in endless["parents"]}


def test_killed_executors_take_ranks_and_pool_along(spark: SparkSession, endless: dict[str, Any]) -> None:
    for executor in descendants("CoarseGrainedExecutorBackend"):
        executor.kill()
    _, alive = psutil.wait_procs([*endless["ranks"], *endless["parents"]], timeout=10)
    assert alive == []
    wait_until(lambda: bool(endless["raised"]), timeout_s=60)


PROGRAM = """
    import os, sys, time
    from pathlib import Path
    import psutil
    from pyspark.sql import SparkSession
    import hvdspark

    folder, ending = sys.argv[1:]

    def parents():
        return psutil.Process().parent().ppid()

    def endless():
        part = Path(folder, os.environ["HOROVOD_RANK"] + ".part")
        part.write_text(f"{os.getpid()} {os.getppid()} {psutil.Process().parent().ppid()}")
        part.rename(part.with_suffix(".pids"))
        time.sleep(600)

    spark = SparkSession.builder.master("local[2]").config("spark.ui.enabled", "false").getOrCreate()
    if ending == "stop":
        (parent,) = set(hvdspark.run(parents, num_proc=2, preload=["json"]))
        parent = psutil.Process(parent)
        assert parent.is_running()
        spark.stop()
        parent.wait(10)
    else:
        hvdspark.run(endless, num_proc=2, preload=["json"])
"""


def test_a_local_session_that_is_stopped_leaves_nothing(tmp_path: Path) -> None:
    """The JVM goes on there until the program ends, the pool does not; nor does it keep the program's output open."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path), "stop"], capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr.decode()


def test_a_killed_driver_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(tmp_path), "kill"]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: len(list(tmp_path.glob("*.pids"))) == 2, timeout_s=90)
        pids = {int(pid) for path in tmp_path.glob("*.pids") for pid in path.read_text().split()}
        left = [psutil.Process(pid) for pid in pids]
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    _, alive = psutil.wait_procs(left, timeout=10)
    assert alive == []


def wait_until(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)
