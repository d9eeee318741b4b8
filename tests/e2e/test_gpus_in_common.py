"""Executors of one host that find the same GPU, as with a discovery script that lists all that the host has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from clusters import gpu_conf
from pyspark.sql import SparkSession

import hvdspark
from hvdspark.errors import RendezvousError

DISCOVERY = """#!/bin/sh
echo '{"name": "gpu", "addresses": ["0"]}'
"""


def spark_conf(folder: Path) -> dict[str, str]:
    return gpu_conf(folder, DISCOVERY)


def test_two_ranks_that_would_share_a_gpu_are_refused_by_name(spark: SparkSession) -> None:
    with pytest.raises(RendezvousError, match=r"ranks 0 and 1 on .* the GPU 0, although .*amount=1 .* none is shared"):
        hvdspark.run(lambda: None, num_proc=2)
    chosen = {"CUDA_VISIBLE_DEVICES": "0"}
    assert hvdspark.run(lambda: os.environ["CUDA_VISIBLE_DEVICES"], num_proc=2, env=chosen) == ["0", "0"]
