"""The fixtures of :mod:`clusters`, for this lane; without a GPU, and a Horovod that has NCCL, its tests are skipped."""

from __future__ import annotations

import ctypes

import pytest
from clusters import (  # noqa: F401 - pytest finds fixtures in a conftest
    _environment,
    _leaves_no_process,
    _shared,
    _travels_by_value,
    spark,
    store,
)
from faulty_fits import df  # noqa: F401


@pytest.fixture(scope="session", autouse=True)
def _has_gpu() -> None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        pytest.skip("not for this machine: NVIDIA's driver is not installed")
    import horovod.tensorflow as hvd

    if not hvd.nccl_built():
        pytest.skip("not for this machine: its Horovod has no NCCL (ci/wheels --gpu makes one that has)")
