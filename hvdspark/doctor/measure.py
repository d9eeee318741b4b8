"""What a rank runs to find out how fast allreduce is."""

from __future__ import annotations

import statistics
import time
from importlib import import_module
from typing import Any

from hvdspark.worker.pulse import moved_on

SMALL_BYTES, LARGE_BYTES = 64, 16 << 20

_WARM_UP, _SMALL_ROUNDS, _LARGE_ROUNDS = 3, 20, 7


def time_allreduce() -> dict[str, Any]:
    """Average a small and a large array of float32 over all ranks, some times.

    Returns
    -------
    dict
        ``controller``, and the median seconds as ``small_s`` and ``large_s``.
    """
    # Only the training process has a framework; the engine knows none.
    hvd, tf = import_module("horovod.tensorflow"), import_module("tensorflow")
    hvd.init()

    def median_s(size_bytes: int, rounds: int) -> float:
        values, taken = tf.ones(size_bytes // 4), []
        for number in range(_WARM_UP + rounds):
            moved_on(f"allreduce of {size_bytes} bytes, round {number}")
            began = time.perf_counter()
            hvd.allreduce(values, op=hvd.Average, name=f"doctor_{size_bytes}").numpy()
            taken.append(time.perf_counter() - began)
        return statistics.median(taken[_WARM_UP:])

    return {
        "controller": "mpi" if hvd.mpi_enabled() else "gloo",
        "small_s": median_s(SMALL_BYTES, _SMALL_ROUNDS),
        "large_s": median_s(LARGE_BYTES, _LARGE_ROUNDS),
    }
