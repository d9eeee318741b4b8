"""Whether training on the GPUs of this machine works, and how fast: the ranks' side alone, without Spark.

Each GPU gets a rank, with --share several: a training process under its guard, as a barrier task starts it. They
average tensors of several sizes by Horovod, and train a small convolutional network on rows from Parquet files, by the
same trainer as a fit's. What was measured goes to standard output as one line of JSON, all else to standard error. With
--cpu the same ranks use Gloo and no GPU: that says whether this program works, and nothing about GPUs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import secrets
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from hvdspark import Store
from hvdspark.data.parquet import survey
from hvdspark.data.partitions import TRAIN, VAL
from hvdspark.launch import gpus, topology
from hvdspark.launch.child import Child, Patience
from hvdspark.launch.gloo import RendezvousServer, gloo_environment
from hvdspark.launch.process import recipe_of
from hvdspark.plan import Manifest, TrainResult
from hvdspark.runs import run_folder
from hvdspark.worker.job import Job

IMAGE = (32, 32, 3)
MIB = 1 << 20
START_TIMEOUT_S = 300.0


class CheckError(Exception):
    """The check cannot be made; the message says why and what to do."""


def find_gpus() -> list[str]:
    """Ask NVIDIA's driver for the GPUs of this machine; raise `CheckError` where it knows of none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CheckError(
            f"there is no GPU here: NVIDIA's driver is not installed ({error}). --cpu checks without"
        ) from error
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or count.value < 1:
        raise CheckError("there is no GPU here: NVIDIA's driver is installed and finds none. --cpu checks without")
    chosen = os.environ.get(gpus.VISIBLE)
    return chosen.split(",")[: count.value] if chosen else [str(number) for number in range(count.value)]


def measure_allreduce(seconds: float, sizes_mib: Sequence[int], want_nccl: bool) -> dict[str, Any]:
    """In a rank: average tensors of several sizes; returns what did it and how long it took."""
    import time

    import horovod.tensorflow as hvd
    import tensorflow as tf
    from hvdspark.estimators.keras.devices import use, visible_gpus

    hvd.init()
    devices = visible_gpus()
    if devices:
        use(devices[0])
    if want_nccl and not (devices and hvd.nccl_built()):
        raise RuntimeError(
            f"TensorFlow {tf.__version__} sees {len(devices)} GPUs, and Horovod was built"
            f" {'with' if hvd.nccl_built() else 'without'} NCCL: install what ci/wheels --gpu makes"
        )
    found = {}
    for size in sizes_mib:
        with tf.device("GPU:0" if devices else "CPU:0"):
            tensor = tf.ones([size * (1 << 20) // 4])
            # What comes back is read, so that the time is that of the whole way.
            average = tf.function(
                lambda x, size=size: hvd.allreduce(x, op=hvd.Average, name=f"check_{size}"), jit_compile=False
            )
        assert float(average(tensor)[-1]) == 1.0
        start, rounds = time.perf_counter(), 0
        # All ranks make the same number of rounds.
        while hvd.broadcast_object(time.perf_counter() - start < seconds / len(sizes_mib), root_rank=0):
            for _ in range(5):
                result = average(tensor)
            float(result[-1])
            rounds += 5
        each_s = (time.perf_counter() - start) / rounds
        found[f"{size} MiB"] = {"ms": round(each_s * 1e3, 3), "gb_per_s": round(size * (1 << 20) / each_s / 1e9, 3)}
    details = tf.config.experimental.get_device_details(devices[0]) if devices else {}
    return {
        "device": details.get("device_name", "GPU" if devices else "CPU"),
        "operations": "NCCL" if devices and hvd.nccl_built() else "Gloo",
        "nccl_built": bool(hvd.nccl_built()),
        "tensorflow": tf.__version__,
        "allreduce": found,
    }


def run_ranks(job: Job, ranks: int, devices: Sequence[str]) -> list[Any]:
    """Run a job on ranks of this machine as barrier tasks would, on a GPU each; returns their answers by rank."""
    peers = [topology.Peer(rank, "localhost", topology.LOOPBACK) for rank in range(ranks)]
    contexts = topology.assign_ranks(peers)
    given = [[device] for device in devices] or [[]] * ranks
    hidden = {} if devices else {gpus.VISIBLE: ""}
    sharing = ranks / len(set(devices)) if devices else 1
    recipe = recipe_of({"TF_CPP_MIN_LOG_LEVEL": "2", "KERAS_BACKEND": "tensorflow", **hidden}, job.modules)
    payload = cloudpickle.dumps(job)
    token = secrets.token_hex(16)
    with RendezvousServer(topology.LOOPBACK, [topology.LOOPBACK], ranks, token) as server:

        def rank(number: int) -> Any:
            environment = {
                **topology.rank_environment(contexts[number]),
                **gloo_environment(server.address, token, "lo"),
                **gpus.gpu_environment(contexts, given, number, hidden, 1 / sharing),
                "NCCL_SOCKET_IFNAME": "lo",
                **({"NCCL_MULTI_RANK_GPU_ENABLE": "1"} if sharing > 1 else {}),
            }
            with Child(recipe, warm=False) as child:
                outcome = child.run(
                    payload, contexts[number], environment, sys.stderr.buffer, Patience(START_TIMEOUT_S)
                )
            if outcome.failure is not None:
                raise CheckError(f"rank {number}: {outcome.failure.error}\n{outcome.failure.details}")
            assert outcome.result is not None  # it is there where no failure is
            return cloudpickle.loads(outcome.result)

        with ThreadPoolExecutor(ranks) as pool:
            return list(pool.map(rank, range(ranks)))


def write_rows(folder: Path, rows: int) -> None:
    """Write images of two kinds: of the second kind the upper half is brighter."""
    random = np.random.default_rng(1)
    kinds = random.integers(0, 2, rows)
    images = random.integers(0, 200, (rows, *IMAGE), dtype=np.uint8)
    images[kinds == 1, : IMAGE[0] // 2] += 55
    columns = {"image": [image.tobytes() for image in images], "kind": kinds.astype(np.float32)}
    folder.mkdir()
    pq.write_table(pa.table(columns), folder / "rows.parquet", row_group_size=max(1, rows // 8))


def training_job(folder: Path, ranks: int, rows: int, batch: int, policy: str) -> Job:
    """Plan a fit on the rows as an estimator does, and return the trainer's job."""
    import keras
    import tensorflow as tf
    from hvdspark.estimators import KerasEstimator
    from hvdspark.estimators.fitting import Fit
    from pyspark.sql.types import BinaryType, FloatType, StructField, StructType

    tf.config.set_visible_devices([], "GPU")  # they are for the ranks, and this process would take their memory
    write_rows(folder / "rows", rows)
    keras.config.set_dtype_policy(policy)
    layers: list[Any] = [keras.Input(IMAGE, dtype="uint8"), keras.layers.Rescaling(1 / 255)]
    for filters in (32, 64, 128):
        layers += [
            keras.layers.Conv2D(filters, 3, padding="same", activation="relu"),
            keras.layers.Conv2D(filters, 3, strides=2, padding="same", activation="relu"),
        ]
    layers += [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(1, dtype="float32", activation="sigmoid")]
    estimator = KerasEstimator(
        num_proc=ranks,
        store=Store.create(folder / "store"),
        model=keras.Sequential(layers),
        optimizer=keras.optimizers.Adam(1e-3),
        loss="binary_crossentropy",
        feature_cols=["image"],
        label_cols=["kind"],
        batch_size=batch,
        epochs=4,
        verbose=0,
        scale_learning_rate=False,
        run_id=f"check-{secrets.token_hex(4)}",
    )
    rows_schema = StructType([StructField("image", BinaryType()), StructField("kind", FloatType())])
    columns, batches = estimator._batch(rows_schema)
    fit: Any = Fit(estimator, None)  # type: ignore[arg-type]  # its rows are known already
    found = survey(str(folder / "rows"), columns)
    store = Store.create(folder / "store")
    draft = fit._draft(store, columns, batches, ranks)
    # As a fit does it, which holds its run there: ranks take a folder that is not there for a Store that has gone.
    store.make_folder(run_folder(draft.run_id))
    plan = draft.complete(Manifest(found.columns, {TRAIN: found.groups, VAL: ()}), found.store.ref(), "")
    job: Job = estimator._job().after(plan)
    return job


def check(arguments: argparse.Namespace) -> dict[str, Any]:
    """Make the check, and return what was measured."""
    on_gpus = not arguments.cpu
    devices = find_gpus() if on_gpus else []
    ranks = arguments.ranks or len(devices) * arguments.share or 2
    if on_gpus and ranks > len(devices) * arguments.share:
        raise CheckError(
            f"--ranks {ranks}, but there are {len(devices)} GPUs for {arguments.share} each (--share says for how many)"
        )
    devices = (devices * arguments.share)[:ranks]
    sizes_mib, rows, batch = ((1, 16, 256), 32_768, 256) if on_gpus else ((1, 16), 512, 32)
    measure = Job(measure_allreduce, (arguments.seconds, sizes_mib, on_gpus))
    (found, *_) = run_ranks(measure, ranks, devices)
    with tempfile.TemporaryDirectory(prefix="hvdspark-gpu-check-") as folder:
        job = training_job(Path(folder), ranks, rows, batch, arguments.policy)
        result: TrainResult = run_ranks(job, ranks, devices)[0]
    losses = [round(loss, 4) for loss in result.history["loss"]]
    if not losses[-1] < losses[0]:
        raise CheckError(f"the loss did not fall while training: {losses}")
    trained = {"samples_per_s": round(result.rows_per_s, 1), "data_wait_share": round(result.data_wait_share, 3)}
    return {"ranks": ranks, **found, "policy": arguments.policy, "batch": batch, **trained, "loss": losses}


def main() -> int:
    """Print the result as one line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cpu", action="store_true", help="the same over Gloo, without GPUs")
    parser.add_argument("--ranks", type=int, help="how many; by default one for each GPU, or two with --cpu")
    parser.add_argument("--share", type=int, default=1, help="how many ranks on each GPU")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to measure the allreduce")
    parser.add_argument("--policy", default="float32", help="Keras' dtype policy, such as mixed_float16")
    arguments = parser.parse_args()
    # Ranks look for modules where they are started first, and a checkout lies there in another form than installed.
    os.chdir(tempfile.gettempdir())
    try:
        found = check(arguments)
    except CheckError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 1
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
