"""Training and scoring on a GPU that Spark deals out to one task at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from clusters import gpu_conf
from faulty_fits import log_of, outcome
from gpu_fits import DISCOVERY, ONE_EXECUTOR, Where, assert_close, fit
from pyspark.sql import DataFrame, SparkSession

from hvdspark import Store
from hvdspark.doctor import examine

MASTER = ONE_EXECUTOR


def spark_conf(folder: Path) -> dict[str, str]:
    return gpu_conf(folder, DISCOVERY)


def test_a_fit_trains_on_the_gpu_as_it_does_on_the_cpu(df: DataFrame, store: Store, tmp_path: Path) -> None:
    on_gpu = fit(df, store, "gpu", callbacks=[Where(tmp_path / "gpu")])
    on_cpu = fit(df, store, "cpu", callbacks=[Where(tmp_path / "cpu")], use_gpu=False)
    assert (tmp_path / "gpu").read_text().endswith("GPU:0")
    assert (tmp_path / "cpu").read_text().endswith("CPU:0")
    assert "GPU 0 (by Spark)" in log_of(store, "gpu")
    assert "training on the CPU" not in log_of(store, "gpu")
    assert_close(outcome(on_gpu), outcome(on_cpu))


def test_a_table_is_scored_as_the_driver_scores_it(df: DataFrame, store: Store) -> None:
    fitted = fit(df, store, "scored")
    rows = fitted.transform(df).toPandas()
    expected = fitted.getModel().predict(rows[["a", "b", "c"]].to_numpy(np.float32), verbose=0)[:, 0]
    np.testing.assert_allclose(rows["y__output"], expected, rtol=1e-2, atol=1e-3)


def test_a_worker_that_scores_takes_no_more_of_its_gpu_than_it_needs(spark: SparkSession) -> None:
    def device(_: int) -> tuple[str, list[bool]]:
        import tensorflow as tf
        from hvdspark.estimators.keras.scorer import choose_device

        choose_device()
        used = tf.config.get_visible_devices("GPU")
        return tf.ones(()).device, [tf.config.experimental.get_memory_growth(each) for each in used]

    ((where, grows),) = spark.sparkContext.parallelize([0], 1).map(device).collect()
    assert where.endswith("GPU:0")
    assert grows == [True]


def test_the_doctor_finds_the_gpu_and_nccl(spark: SparkSession) -> None:
    found = [finding for finding in examine(spark, num_proc=1).findings if finding.check == "gpus"]
    assert [finding.severity for finding in found] == ["ok"], found


@pytest.mark.parametrize("share", [[], ["--share", "2"]], ids=["a rank", "two ranks"])
def test_the_check_of_gpus_trains_on_them_without_spark(share: list[str]) -> None:
    check = Path(__file__).resolve().parents[2] / "ci" / "gpu_check.py"
    done = subprocess.run(
        [sys.executable, check, "--seconds", "1", *share], capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["operations"] == "NCCL"
