"""Launches that Spark does not begin with, and settings of Spark that could disturb one."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from faulty_fits import Trained, assert_same, estimator, outcome
from pyspark import BarrierTaskContext
from pyspark.sql import DataFrame, SparkSession

import hvdspark
from hvdspark import Store
from hvdspark.errors import LaunchTimeoutError, RendezvousError
from hvdspark.launch import barrier, watch
from hvdspark.launch.meeting import gather_apart


def spark_conf(_: Path) -> dict[str, str]:
    # Slow tasks are tried a second time elsewhere, and here any task is slow.
    return {
        "spark.speculation": "true",
        "spark.speculation.interval": "10ms",
        "spark.speculation.multiplier": "1.01",
        "spark.speculation.quantile": "0.1",
    }


def test_a_job_that_spark_does_not_begin_with_ends_and_says_so(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As when an executor goes after the slots were counted: Spark looks again for ten minutes, without a word."""
    caplog.set_level(logging.INFO, logger="hvdspark")
    monkeypatch.setattr(barrier, "check_slots", lambda *_: None)
    monkeypatch.setattr(watch, "_WORTH_A_WORD_S", 1.0)
    started = time.monotonic()
    with pytest.raises(LaunchTimeoutError, match=r"none of the job's tasks within 4 s, .* can run 2 tasks at once"):
        hvdspark.run(lambda: None, num_proc=3, start_timeout=4)
    assert time.monotonic() - started < 30
    assert "waiting for Spark to begin with the ranks' tasks" in caplog.text


def test_a_job_behind_another_says_for_which_it_waits(
    spark: SparkSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="hvdspark")
    monkeypatch.setattr(watch, "_WORTH_A_WORD_S", 1.0)
    begun, over = tmp_path / "begun", tmp_path / "over"

    def hold() -> None:
        begun.touch()
        while not over.exists():
            time.sleep(0.05)

    def run(work: Any) -> threading.Thread:
        thread = threading.Thread(target=hvdspark.run, args=(work,), kwargs={"num_proc": 2, "spark": spark})
        thread.start()
        return thread

    def wait_for(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.05)

    def said() -> list[str]:
        return [line for line in caplog.messages if line.startswith("waiting for slots")]

    first = run(hold)
    wait_for(begun.exists)
    second = run(lambda: None)
    wait_for(lambda: bool(said()))
    over.touch()
    for thread in (first, second):
        thread.join()
    text = "waiting for slots before Spark can begin with the ranks' tasks; it runs now: 2 tasks of 'hvdspark: 2 ranks'"
    assert said() == [text]


def test_tasks_on_several_hosts_do_not_wait_for_one_that_does_not_come_and_their_executors_stay(
    spark: SparkSession, tmp_path: Path
) -> None:
    """What they meet by there; it does not ask where it is."""
    mark = str(tmp_path / "given up")

    def task(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for _ in batches:
            pass
        barrier = BarrierTaskContext.get()
        said = "hung"
        if barrier.partitionId() == 0:
            try:
                gather_apart(barrier, "here", 0.5)
            except RendezvousError as exc:
                said = str(exc)
            Path(mark).touch()
        while not Path(mark).exists():
            time.sleep(0.05)
        yield pa.RecordBatch.from_pydict({"said": [said]})

    def met(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for _ in batches:
            pass
        barrier = BarrierTaskContext.get()
        yield pa.RecordBatch.from_pydict({"said": gather_apart(barrier, f"{barrier.partitionId()}", 60.0)})

    def run(work: Any) -> list[str]:
        frame = spark.range(2, numPartitions=2).mapInArrow(work, "said string", barrier=True)
        return [row["said"] for row in frame.collect()]

    assert run(met) == ["0", "1"] * 2
    before = executors(spark)
    found = run(task)
    assert found[0].startswith("the tasks did not find each other within 0.5 s: one of them hangs")
    assert found[1] == "hung"
    assert run(met) == ["0", "1"] * 2
    assert executors(spark) == before


def executors(spark: SparkSession) -> set[str]:
    infos = spark.sparkContext._jsc.sc().statusStore().executorList(True)
    return {infos.apply(number).id() for number in range(infos.length())}


def test_speculation_writes_and_trains_no_row_twice(
    spark: SparkSession, df: DataFrame, store: Store, undisturbed: Trained
) -> None:
    assert spark.sparkContext.getConf().get("spark.speculation") == "true"
    model: Any = estimator(store).fit(df)
    assert_same(outcome(model), undisturbed)
