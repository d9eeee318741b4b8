"""The doctor waits for nothing for ever."""

from __future__ import annotations

import threading
import time

import pytest
from pyspark.sql import SparkSession

from hvdspark.doctor import examine
from hvdspark.doctor.stage import bounded
from hvdspark.errors import LaunchTimeoutError, ParamError


def test_a_job_that_hangs_is_cancelled_when_its_time_is_up(spark: SparkSession) -> None:
    context = spark.sparkContext

    def hang() -> None:
        context.parallelize([0], 1).foreach(lambda _: time.sleep(600))

    with pytest.raises(LaunchTimeoutError, match=r"^the job did not end within 2 s"):
        bounded(spark, hang, "the job", 2.0)
    tracker = context.statusTracker()
    deadline = time.monotonic() + 60
    while tracker.getActiveJobsIds():
        assert time.monotonic() < deadline
        threading.Event().wait(0.05)


def test_an_error_of_the_job_comes_through(spark: SparkSession) -> None:
    with pytest.raises(ZeroDivisionError):
        bounded(spark, lambda: 1 // 0, "the job", 60.0)


@pytest.mark.parametrize(("name", "value"), [("num_proc", 0), ("timeout_s", 0.0), ("controller", "glo")])
def test_a_parameter_that_cannot_be_is_refused_before_any_job(spark: SparkSession, name: str, value: object) -> None:
    with pytest.raises(ParamError) as caught:
        examine(spark, **{name: value})  # type: ignore[arg-type]
    assert caught.value.param == name
