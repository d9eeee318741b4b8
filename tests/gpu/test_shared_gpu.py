"""Two ranks over NCCL on one GPU, which newer versions allow where they are told to: what one GPU can show of two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import pytest
from clusters import gpu_conf
from faulty_fits import ROWS, Fault, die, log_of, outcome, stop
from gpu_fits import DISCOVERY, ONE_EXECUTOR, Where, assert_close, fit
from pyspark.sql import DataFrame

from hvdspark import Store

MASTER = ONE_EXECUTOR

SHARED = {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}


def spark_conf(folder: Path) -> dict[str, str]:
    return {**gpu_conf(folder, DISCOVERY), "spark.task.resource.gpu.amount": "0.5"}


def test_two_ranks_train_as_one_does_on_all_rows(df: DataFrame, store: Store, tmp_path: Path) -> None:
    keywords: dict[str, Any] = {"shuffle": False, "scale_learning_rate": False, "epochs": 30, "backend_env": SHARED}
    one = fit(df, store, "one", batch_size=ROWS, **keywords)
    where = [Where(tmp_path / "where")]
    two = fit(df, store, "two", batch_size=ROWS // 2, num_proc=2, callbacks=where, **keywords)
    assert (tmp_path / "where").read_text().endswith("GPU:0")
    logs = [log_of(store, "two", rank) for rank in (0, 1)]
    assert all("NCCL INFO" in log and "nranks 2" in log for log in logs), logs
    assert_close(outcome(two), outcome(one))
    assert outcome(one)[0]["loss"][-1] < outcome(one)[0]["loss"][0] / 1.2


@pytest.mark.parametrize("controller", ["gloo", "mpi"])
def test_mixed_precision_with_compressed_gradients_learns(df: DataFrame, store: Store, controller: str) -> None:
    half = keras.DTypePolicy("mixed_float16")
    hidden = [keras.layers.Dense(64, activation="relu", dtype=half) for _ in range(2)]
    network = keras.Sequential([keras.Input((3,)), *hidden, keras.layers.Dense(1, dtype="float32")])
    keywords = {"model": network, "epochs": 8, "controller": controller, "gradient_compression": "fp16"}
    losses = fit(df, store, "mixed", num_proc=2, backend_env=SHARED, **keywords).getHistory()["loss"]
    assert losses[-1] < losses[0] / 3
    assert f"controller {controller}" in log_of(store, "mixed")
    assert "NCCL INFO" in log_of(store, "mixed")


@pytest.mark.parametrize(("act", "seen"), [(die, "was killed by SIGKILL"), (stop, "gave no sign of life")])
def test_a_rank_lost_amid_nccl_is_replaced_and_the_fit_goes_on(
    df: DataFrame,
    store: Store,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    act: Callable[[], None],
    seen: str,
) -> None:
    keywords: dict[str, Any] = {"num_proc": 2, "backend_env": SHARED, "stall_timeout_s": 10.0}
    expected = outcome(fit(df, store, "whole", **keywords))
    fault = Fault(tmp_path / "mark", 1, 2, 3, act)
    found = outcome(fit(df, store, "lost", callbacks=[fault], **keywords))
    assert any(seen in record.message and "restart 1 of 3" in record.message for record in caplog.records)
    assert_close(found, expected)
