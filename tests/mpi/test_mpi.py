"""MPI as the control plane: the same jobs as over Gloo, with mpi4py beside Horovod."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from clusters import KERAS_RANK
from hvdspark.estimators import KerasEstimator
from pyspark.sql import SparkSession

import hvdspark
from hvdspark import Store
from hvdspark.errors import ParamError, RendezvousError, WorkerFailedError

MASTER = "local-cluster[2,2,2048]"


def test_mpi4py_can_be_used_beside_horovod_and_by_a_part_of_the_ranks(spark: SparkSession) -> None:
    def work() -> dict[str, Any]:
        from mpi4py import MPI

        world = MPI.COMM_WORLD
        local = world.Split_type(MPI.COMM_TYPE_SHARED)
        pair = world.Split(color=world.rank // 2, key=world.rank)
        import horovod.tensorflow as hvd
        import tensorflow as tf

        hvd.init(comm=pair)
        total = hvd.allreduce(tf.constant(float(world.rank)), op=hvd.Sum)
        found = {
            "world": (world.rank, world.size),
            "local": (local.rank, local.size),
            "all": world.allreduce(10**world.rank),
            "horovod": (hvd.rank(), hvd.size(), hvd.mpi_enabled(), hvd.gloo_enabled()),
            "pair": float(total),
        }
        world.Barrier()
        return found

    results = hvdspark.run(work, num_proc=4, controller="mpi", preload=KERAS_RANK)
    assert [result["world"] for result in results] == [(rank, 4) for rank in range(4)]
    assert [result["local"] for result in results] == [(rank, 4) for rank in range(4)]
    assert {result["all"] for result in results} == {1111}
    assert [result["horovod"] for result in results] == [(0, 2, True, False), (1, 2, True, False)] * 2
    assert [result["pair"] for result in results] == [1.0, 1.0, 5.0, 5.0]


@pytest.fixture(autouse=True)
def _leaves_no_shared_memory() -> Iterator[None]:
    """Not even ranks that were killed leave any."""
    before = set(Path("/dev/shm").iterdir())
    yield
    assert set(Path("/dev/shm").iterdir()) <= before


# Of the warm pool, and started cold.
@pytest.mark.parametrize(("controller", "preload"), [("gloo", KERAS_RANK), ("mpi", [])])
def test_a_killed_rank_ends_the_job_at_once_and_is_named(
    spark: SparkSession, tmp_path: Path, controller: str, preload: Sequence[str]
) -> None:
    """Under MPI nobody notices by itself: the others wait in a collective."""
    mark = tmp_path / "killed"

    def killed() -> None:
        import horovod.tensorflow as hvd
        import tensorflow as tf

        hvd.init()
        hvd.allreduce(tf.zeros(3), name="both are there")
        if hvd.rank() == 1:
            mark.write_text(str(time.time()))
            os.kill(os.getpid(), signal.SIGKILL)
        hvd.allreduce(tf.zeros(3), name="waits for the dead")

    with pytest.raises(WorkerFailedError, match=r"^rank 1 on .* was killed by SIGKILL") as caught:
        hvdspark.run(killed, num_proc=2, controller=controller, preload=preload)
    assert time.time() - float(mark.read_text()) < 5
    assert set(caught.value.failures) == {0, 1}


def test_a_rank_that_does_something_else_is_stopped_when_another_fails(spark: SparkSession) -> None:
    def work() -> None:
        if os.environ["HOROVOD_RANK"] == "0":
            time.sleep(600)
        raise LookupError("no such thing")

    with pytest.raises(WorkerFailedError, match=r"^rank 1 on .*: LookupError: no such thing") as caught:
        hvdspark.run(work, num_proc=2)
    assert re.fullmatch(r"stopped, because rank 1 on \S+ had failed", caught.value.failures[0])


def test_rdma_that_is_not_there_is_an_error_before_any_rank_works(spark: SparkSession) -> None:
    if Path("/sys/class/infiniband").exists():
        pytest.skip("not for this machine: it has RDMA devices")
    with pytest.raises(RendezvousError, match=r"rdma=True, but .* has no RDMA port that is up; it has: no RDMA device"):
        hvdspark.run(lambda: None, num_proc=2, rdma=True)


def test_a_controller_that_is_not_known_is_refused() -> None:
    with pytest.raises(ParamError, match=r"controller='mpy'.*'mpi'"):
        hvdspark.run(lambda: None, num_proc=2, controller="mpy")


def test_both_controllers_train_to_the_same_weights(spark: SparkSession, store: Store) -> None:
    random = np.random.default_rng(3)
    x = random.normal(size=(600, 2))
    rows = [(float(a), float(b), float(a - 2 * b)) for a, b in x]
    df = spark.createDataFrame(rows, "a double, b double, y double").repartition(3)
    keras.utils.set_random_seed(0)
    network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(1)])

    def fit(**keywords: Any) -> tuple[list[np.ndarray], dict[str, list[float]]]:
        estimator = KerasEstimator(
            num_proc=2,
            store=store,
            model=keras.models.clone_model(network),
            optimizer=keras.optimizers.Adam(0.01),
            loss="mse",
            feature_cols=[["a", "b"]],
            label_cols=["y"],
            batch_size=32,
            epochs=3,
            verbose=0,
            **keywords,
        )
        estimator.getModel().set_weights(network.get_weights())
        model: Any = estimator.fit(df)
        return [np.asarray(weight) for weight in model.getModel().weights], model.getHistory()

    expected, history = fit(controller="gloo", allreduce="horovod")
    assert history["loss"][-1] < history["loss"][0] / 2
    said = {
        "mpi": "controller mpi by MPICH (as asked for), shared memory of one host",
        "auto": "controller gloo (all ranks are on one host), TCP over lo",
    }
    for keywords in ({"controller": "mpi", "allreduce": "horovod"}, {"controller": "mpi"}, {"controller": "auto"}):
        found, _ = fit(run_id=f"run-{len(store.list('runs'))}", **keywords)
        log = Path(store.path(f"runs/run-{len(store.list('runs')) - 1}/logs/rank-1.log")).read_text()
        assert said[keywords["controller"]] in log
        in_memory = "gradients are averaged in memory that the ranks of the host share"
        assert (in_memory in log) == (keywords.get("allreduce") != "horovod")
        for mine, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
