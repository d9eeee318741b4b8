"""GPUs that Spark deals out, where the scheduling is real and the devices are not: no rank of these looks for one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import keras
import psutil
import pytest
from clusters import gpu_conf
from hvdspark.estimators import KerasEstimator
from pyspark.sql import SparkSession

import hvdspark
from hvdspark import Store
from hvdspark.errors import NotEnoughSlotsError

# Two cores and one GPU on each executor.
MASTER = "local-cluster[2,2,1024]"

ADDRESSES = {"0", "MIG-6e1d2b1c-0f4a-5c1e-9d3a-1b2c3d4e5f60"}

# Each worker asks on its own, and none may find what another has found: the first to make the folder has GPU 0.
DISCOVERY = """#!/bin/sh
if mkdir "{folder}/taken" 2>/dev/null; then address=0; else address={mig}; fi
echo "{{\\"name\\": \\"gpu\\", \\"addresses\\": [\\"$address\\"]}}"
"""


def spark_conf(folder: Path) -> dict[str, str]:
    return gpu_conf(folder, DISCOVERY.format(folder=folder, mig=max(ADDRESSES)))


def visible() -> dict[str, Any]:
    names = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
    return {**{name: os.environ.get(name) for name in names}, "pool": psutil.Process().parent().ppid()}


def test_each_rank_sees_the_gpu_that_spark_gave_its_task(spark: SparkSession) -> None:
    """Also where the ranks are forks of a process that was started before anybody knew which."""
    first, second = (hvdspark.run(visible, num_proc=2, preload=["json"]) for _ in range(2))
    assert {found["CUDA_VISIBLE_DEVICES"] for found in first} == ADDRESSES
    assert {found["CUDA_VISIBLE_DEVICES"] for found in second} == ADDRESSES
    # Numbers are those of nvidia-smi, which CUDA by itself does not count by.
    order = {found["CUDA_VISIBLE_DEVICES"]: found["CUDA_DEVICE_ORDER"] for found in first}
    assert order == {"0": "PCI_BUS_ID", max(ADDRESSES): None}
    assert {found["pool"] for found in first} == {found["pool"] for found in second}


def test_what_the_user_makes_visible_stays(spark: SparkSession) -> None:
    found = hvdspark.run(visible, num_proc=2, env={"CUDA_VISIBLE_DEVICES": "3,1"})
    assert [rank["CUDA_VISIBLE_DEVICES"] for rank in found] == ["3,1", "3,1"]


def test_the_error_says_that_gpus_run_out_before_cores_do(spark: SparkSession) -> None:
    with pytest.raises(
        NotEnoughSlotsError, match=r"needs 3 slots, .* 2 at once\. .* GPUs, .*task.*amount=1, .*amount=1"
    ):
        hvdspark.run(visible, num_proc=3)


def test_a_worker_that_scores_sees_the_gpu_of_its_task(spark: SparkSession) -> None:
    def seen(_: int) -> tuple[str, str]:
        from hvdspark.estimators.keras.scorer import choose_device
        from pyspark import TaskContext

        choose_device()
        (given,) = TaskContext.get().resources()["gpu"].addresses
        return given, os.environ["CUDA_VISIBLE_DEVICES"]

    found = spark.sparkContext.parallelize(range(2), 2).map(seen).collect()
    assert {given for given, _ in found} <= ADDRESSES
    assert all(given == own for given, own in found)


@pytest.mark.parametrize("use_gpu", [True, False])
def test_the_log_of_a_run_says_which_gpu_each_rank_has(spark: SparkSession, store: Store, use_gpu: bool) -> None:
    df = spark.createDataFrame([(float(i % 7), float(i % 7) * 2) for i in range(64)], "x double, y double")
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)])
    estimator = KerasEstimator(
        num_proc=2,
        store=store,
        model=model,
        optimizer=keras.optimizers.SGD(0.005),
        loss="mse",
        feature_cols=["x"],
        label_cols=["y"],
        batch_size=8,
        epochs=2,
        verbose=0,
        use_gpu=use_gpu,
        run_id="run",
    )
    trained: Any = estimator.fit(df)
    losses = trained.getHistory()["loss"]
    assert losses[-1] < losses[0]
    logs = [Path(store.path(f"runs/run/logs/rank-{rank}.log")).read_text() for rank in range(2)]
    expected = (
        {f"GPU {address} (by Spark)" for address in ADDRESSES} if use_gpu else {"GPU none (by CUDA_VISIBLE_DEVICES)"}
    )
    assert {text for text in expected for log in logs if text in log} == expected
    assert all("NCCL_IB_DISABLE=1" in log for log in logs)
    # There is none in truth: a fit that was to use one does not go to the CPU in silence.
    assert all(("training on the CPU: Spark gave this rank a GPU" in log) == use_gpu for log in logs)
