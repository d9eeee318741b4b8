"""``hvdspark.run``: real ranks on two executors, and what the driver hears of them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from clusters import KERAS_RANK
from pyspark.sql import SparkSession

import hvdspark
from hvdspark.errors import LaunchError, LaunchTimeoutError, NotEnoughSlotsError, RendezvousError, WorkerFailedError


def test_results_come_by_rank_and_the_ranks_are_one_job(spark: SparkSession) -> None:
    def work(base: float, *, factor: float) -> dict[str, Any]:
        import horovod.tensorflow as hvd
        import tensorflow as tf

        hvd.init()
        total = hvd.allreduce(tf.constant(base + hvd.rank()), op=hvd.Sum)
        return {
            "rank": hvd.rank(),
            "size": hvd.size(),
            "local": (hvd.local_rank(), hvd.local_size()),
            "cross": (hvd.cross_rank(), hvd.cross_size()),
            "sum": float(total) * factor,
            "mark": os.environ["MARK"],
            "interface": os.environ["HOROVOD_GLOO_IFACE"],
            "pid": os.getpid(),
        }

    results = hvdspark.run(work, (10.0,), {"factor": 2.0}, num_proc=2, env={"MARK": "set"})
    assert [result["rank"] for result in results] == [0, 1]
    assert {result["size"] for result in results} == {2}
    assert {result["sum"] for result in results} == {42.0}
    assert [result["local"] for result in results] == [(0, 2), (1, 2)]
    assert {result["cross"] for result in results} == {(0, 1)}
    assert {(result["mark"], result["interface"]) for result in results} == {("set", "lo")}
    assert len({result["pid"] for result in results}) == 2


def test_the_number_of_ranks_defaults_to_the_slots_of_the_cluster(spark: SparkSession) -> None:
    assert len(hvdspark.run(lambda: None)) == 2


def test_the_users_error_of_rank_1_arrives_by_name(spark: SparkSession) -> None:
    def broken() -> None:
        import horovod.tensorflow as hvd
        import tensorflow as tf

        hvd.init()
        if hvd.rank() == 1:
            print("a line before the error")
            raise LookupError("no such flight")
        hvd.allreduce(tf.zeros(3))

    with pytest.raises(WorkerFailedError) as caught:
        hvdspark.run(broken, num_proc=2, preload=KERAS_RANK)
    error = caught.value
    assert str(error).splitlines()[0] == "rank 1 on 127.0.0.1: LookupError: no such flight"
    assert "in broken" in str(error)
    assert error.root_cause == 1
    assert error.failures[1] == "LookupError: no such flight"
    assert "a line before the error" in error.log_tail


def test_a_killed_rank_ends_the_job_at_once_and_is_named(spark: SparkSession) -> None:
    def killed() -> None:
        import horovod.tensorflow as hvd
        import tensorflow as tf

        hvd.init()
        hvd.allreduce(tf.zeros(3), name="both are there")
        if hvd.rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        for step in range(1_000_000):
            hvd.allreduce(tf.zeros(3), name=f"step {step}")

    with pytest.raises(WorkerFailedError, match=r"^rank 0 on .*SIGKILL") as caught:
        hvdspark.run(killed, num_proc=2, preload=KERAS_RANK)
    assert caught.value.root_cause == 0


def test_a_killed_rank_is_named_though_its_peer_raises_an_error_of_its_own_because_of_it(spark: SparkSession) -> None:
    def killed() -> None:
        import horovod.tensorflow as hvd
        import tensorflow as tf

        hvd.init()
        hvd.allreduce(tf.zeros(3), name="both are there")
        if hvd.rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        for step in range(1_000_000):
            try:
                hvd.allreduce(tf.zeros(3), name=f"step {step}")
            except Exception as exc:
                raise RuntimeError(f"step {step} failed") from exc

    with pytest.raises(WorkerFailedError, match=r"^rank 0 on .*SIGKILL") as caught:
        hvdspark.run(killed, num_proc=2, preload=KERAS_RANK)
    assert caught.value.is_passing
    assert caught.value.failures[1].startswith("RuntimeError: step ")


def test_too_many_ranks_are_refused_without_a_job(spark: SparkSession) -> None:
    started = time.monotonic()
    with pytest.raises(NotEnoughSlotsError, match="needs 4 slots, the cluster can run 2 at once") as caught:
        hvdspark.run(lambda: None, num_proc=4)
    assert (caught.value.needed, caught.value.available) == (4, 2)
    assert time.monotonic() - started < 10
    assert not spark.sparkContext.statusTracker().getActiveJobsIds()


def test_an_unknown_interface_is_an_error_that_lists_those_there_are(spark: SparkSession) -> None:
    with pytest.raises(RendezvousError, match=r"none of the network interfaces ib7 .* lo \(127\.0\.0\.1\)"):
        hvdspark.run(lambda: None, num_proc=2, nics=["ib7"])


def test_a_place_for_temporary_files_that_is_not_there_is_named_with_what_to_do(spark: SparkSession) -> None:
    with pytest.raises(RendezvousError, match=r"^rank \d on .*no place for temporary files: .*/no/such/.*TMPDIR"):
        hvdspark.run(lambda: None, num_proc=2, env={"TMPDIR": "/no/such"})


def test_ranks_that_do_not_begin_in_time_are_named_and_ended(spark: SparkSession) -> None:
    class Unending:
        """What a rank is not through reading when its time is over, however fast it started."""

        def __reduce__(self) -> tuple[Callable[[float], None], tuple[int]]:
            return time.sleep, (600,)

    with pytest.raises(LaunchTimeoutError, match=r"^rank \d on .*did not begin within 1 s.*raise start_timeout"):
        hvdspark.run(lambda _: None, (Unending(),), num_proc=2, start_timeout=1)


def test_a_cancelled_job_takes_its_training_processes_along(spark: SparkSession, tmp_path: Path) -> None:
    def endless(folder: str) -> None:
        import subprocess
        import sys

        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        part = Path(folder) / f"{os.environ['HOROVOD_RANK']}.part"
        part.write_text(f"{os.getpid()} {child.pid}")
        part.rename(part.with_suffix(".pids"))
        time.sleep(600)

    raised: list[BaseException] = []

    def drive() -> None:
        spark.sparkContext.setJobGroup("endless", "to be cancelled", interruptOnCancel=True)
        try:
            hvdspark.run(endless, (str(tmp_path),), num_proc=2, spark=spark)
        except LaunchError as exc:
            raised.append(exc)

    driver = threading.Thread(target=drive)
    driver.start()
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("*.pids"))) < 2:
        assert time.monotonic() < deadline, "the ranks did not begin"
        time.sleep(0.05)
    pids = [int(pid) for path in tmp_path.glob("*.pids") for pid in path.read_text().split()]
    processes = [psutil.Process(pid) for pid in pids]
    spark.sparkContext.cancelJobGroup("endless")
    driver.join(timeout=30)
    assert not driver.is_alive()
    assert "cancelled" in str(raised[0])
    _, alive = psutil.wait_procs(processes, timeout=10)
    assert alive == []
