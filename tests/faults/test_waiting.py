"""Launches that Spark does not begin with, and settings of Spark that could disturb one."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest
from faulty_fits import Trained, assert_same, estimator, outcome
from pyspark.sql import DataFrame, SparkSession

import hvdspark
from hvdspark import Store
from hvdspark.errors import LaunchTimeoutError
from hvdspark.launch import barrier


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
    started = time.monotonic()
    with pytest.raises(LaunchTimeoutError, match=r"none of the job's tasks within 8 s, .* can run 2 tasks at once"):
        hvdspark.run(lambda: None, num_proc=3, start_timeout=8)
    assert time.monotonic() - started < 30
    assert "waiting for Spark to begin with the ranks' tasks" in caplog.text


def test_speculation_writes_and_trains_no_row_twice(
    spark: SparkSession, df: DataFrame, store: Store, undisturbed: Trained
) -> None:
    assert spark.sparkContext.getConf().get("spark.speculation") == "true"
    model: Any = estimator(store).fit(df)
    assert_same(outcome(model), undisturbed)
