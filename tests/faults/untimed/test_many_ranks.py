"""Many more ranks than cores: they start, meet, and end."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path

import pytest
from pyspark.sql import SparkSession

import hvdspark
from hvdspark.errors import WorkerFailedError

MASTER = "local[16]"


@pytest.mark.parametrize(("ranks", "controller"), [(16, "gloo"), (8, "mpi")])
def test_more_ranks_than_cores_are_one_job(spark: SparkSession, ranks: int, controller: str) -> None:
    def work() -> tuple[int, int, float]:
        import horovod.tensorflow as hvd
        import tensorflow as tf

        hvd.init()
        total = hvd.allreduce(tf.constant(float(hvd.rank())), op=hvd.Sum, name="ranks")
        return hvd.rank(), hvd.local_rank(), float(total)

    found = hvdspark.run(
        work, num_proc=ranks, controller=controller, preload=["tensorflow", "horovod.tensorflow"], start_timeout=300
    )
    assert found == [(rank, rank, sum(range(ranks))) for rank in range(ranks)]


def test_what_a_killed_rank_had_in_its_temporary_folder_is_gone(spark: SparkSession, tmp_path: Path) -> None:
    def work() -> None:
        folder = tempfile.mkdtemp()
        Path(tmp_path, os.environ["HOROVOD_RANK"]).write_text(folder)
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(WorkerFailedError, match="SIGKILL"):
        hvdspark.run(work, num_proc=2)
    folders = [Path(path.read_text()) for path in tmp_path.iterdir()]
    assert folders
    for folder in folders:
        assert folder.parent.name.startswith("hvdspark-rank-")
        assert not folder.parent.exists()
