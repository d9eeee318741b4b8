"""A rank with little memory reads, and trains on, a shard that is several times larger."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from hvdspark.data.partitions import TRAIN
from hvdspark.data.shards import plan_shards
from hvdspark.plan import BatchSpec, ColumnSpec, FitPlan, TensorSpec

ROWS, WIDTH = 60_000, 5_000
CAP_BYTES = 80 << 20

# What the process has in memory before it begins is not counted: the cap is on what the rows may add to it.
CAPPED = """
import dataclasses, pickle, resource, sys
from pathlib import Path
import numpy as np
from hvdspark.data import source
from hvdspark.data.shards import reads_of
from hvdspark.store import Store

plan, cap_bytes = pickle.loads(Path(sys.argv[1]).read_bytes())
plan = dataclasses.replace(plan, cache=sys.argv[2])
source.SHUFFLE_WINDOW_BYTES = 4 << 20

def kilobytes(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[name].split()[0])

def cap():
    global resident_kb
    # Threads' stacks count for this limit with their full size, so it is wider than what is asserted in the end.
    limit = kilobytes("VmData") * 1024 + 2 * cap_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resident_kb = kilobytes("VmRSS")

def check(numbers):
    assert np.array_equal(np.sort(np.concatenate(numbers).ravel()), np.arange(plan.train.rows)), "not each row once"

def finish():
    print((kilobytes("VmHWM") - resident_kb) * 1024)
"""

READS = (
    CAPPED
    + """
rows = source.BlockSource(
    Store.from_ref(plan.store), plan.dataset, plan.columns, reads_of(plan.train, 0), shuffle=True, cache=plan.cache
)
cap()
for blocks in rows.passes(range(3), 256):
    numbers = []
    for item in blocks:
        assert (item["image"][:, 0] == item["row"][:, 0] % 251).all()
        numbers.append(item["row"])
    check(numbers)
finish()
"""
)

TRAINS = (
    CAPPED
    + """
import keras
import tensorflow as tf
from hvdspark.estimators.keras.batches import Batches
from hvdspark.estimators.keras.feeding import StepFeed

tf.config.threading.set_intra_op_parallelism_threads(2)
tf.config.threading.set_inter_op_parallelism_threads(2)
inputs = keras.Input((5000,))
model = keras.Model(inputs, keras.layers.Dense(1)(keras.layers.Rescaling(1 / 255)(inputs)))
model.compile("sgd", "mse", jit_compile=False)

@tf.function(reduce_retracing=True)
def step(x, number):
    model.train_step((x, x[:, :1] / 255.0))
    return number

def train(shards, epochs):
    batches = Batches(plan, shards, 0, shuffle=True, workers=2, passes=epochs)
    feed = StepFeed(batches, epochs, fill=True)
    found = []
    while len(found) < epochs * shards.steps:
        portion = feed.take(1)
        found.append(step(*batches.batch(portion.chunk, portion.start)).numpy())
    return found

first = dataclasses.replace(plan.train, groups=plan.train.groups[:1])
train(first, 1)  # by now TensorFlow has made its threads
cap()
numbers = train(plan.train, 2)
check(numbers[: plan.train.steps])
check(numbers[plan.train.steps :])
finish()
"""
)


@pytest.fixture(scope="module")
def plan_file(write_dataset: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 300 MB of rows, in row groups of 1 MB."""
    columns = (ColumnSpec("image", "array", "uint8", None), ColumnSpec("row", "scalar", "int64"))

    def batch(start: int) -> pa.RecordBatch:
        row = np.arange(start, start + 5000)
        values = np.repeat((row % 251).astype("u1"), WIDTH)
        images = pa.ListArray.from_arrays(np.arange(len(row) + 1, dtype=np.int32) * WIDTH, pa.array(values))
        return pa.RecordBatch.from_pydict({"image": images, "row": row})

    written = write_dataset(columns, [[batch(start) for start in range(0, ROWS, 5000)]], group_bytes=1 << 20)
    shards = plan_shards(written.manifest.splits[TRAIN], 1, 100, keep_order=False)
    assert shards.rows * WIDTH > 3.5 * CAP_BYTES
    plan = FitPlan(
        run_id="run",
        store=written.store.ref(),
        dataset=written.dataset,
        columns=written.manifest.columns,
        batch=BatchSpec((TensorSpec(("image",), (WIDTH,), "float32"),), (TensorSpec(("row",), (1,), "int64"),)),
        train=shards,
        val=None,
        epochs=2,
        shuffle=True,
        seed=1,
    )
    path = tmp_path_factory.mktemp("plan") / "plan.pickle"
    path.write_bytes(pickle.dumps((plan, CAP_BYTES)))
    return path


def run_capped(program: str, plan_file: Path, cache: str, scratch: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, str(plan_file), cache]
    # Allocators with a pool per thread reserve far more than they use, which a limit of this kind counts.
    env = os.environ | {
        "SPARK_LOCAL_DIRS": str(scratch),
        "ARROW_DEFAULT_MEMORY_POOL": "system",
        "MALLOC_ARENA_MAX": "1",
    }
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("cache", ["none", "disk", "auto"])
def test_a_shard_three_times_the_memory_is_read_each_row_once(plan_file: Path, tmp_path: Path, cache: str) -> None:
    done = run_capped(READS, plan_file, cache, tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < CAP_BYTES
    assert list(tmp_path.iterdir()) == []


def test_the_cap_is_one_that_the_rows_do_not_fit_into(plan_file: Path, tmp_path: Path) -> None:
    done = run_capped(READS, plan_file, "memory", tmp_path)
    assert done.returncode != 0
    assert "MemoryError" in done.stderr


def test_a_model_trains_on_a_shard_three_times_the_memory(plan_file: Path, tmp_path: Path) -> None:
    done = run_capped(TRAINS, plan_file, "auto", tmp_path)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) < CAP_BYTES
