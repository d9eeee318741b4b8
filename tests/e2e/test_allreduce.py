"""Whichever way gradients are averaged, the weights are those of a plain Keras script with Horovod."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import keras
import numpy as np
from gloo_ranks import first_line, two_gloo_ranks
from hvdspark.estimators import KerasEstimator
from pyspark.sql import SparkSession

from hvdspark import Store

TIMEOUT_S = 120

# What somebody writes who has neither Spark nor hvdspark: rows in memory, model.fit, Horovod's defaults.
PLAIN_SCRIPT = """
import os
import horovod.tensorflow as hvd, keras, numpy as np
folder = os.environ["FOLDER"]
hvd.init()
rows = np.load(folder + "/rows.npz")
model = keras.models.load_model(folder + "/model.keras")

class Averaging(keras.optimizers.Adam):
    def apply(self, grads, trainable_variables=None):
        super().apply(hvd.grouped_allreduce(list(grads), op=hvd.Average), trainable_variables)

model.compile(optimizer=Averaging(0.01), loss="mse", jit_compile=False)
# Without shuffling, hvdspark's ranks share the consecutive rows of each step.
own = [np.concatenate(np.split(rows[name], len(rows[name]) // 32)[hvd.rank()::2]) for name in ("x", "y")]
history = model.fit(*own, batch_size=32, epochs=3, shuffle=False, verbose=0)
if hvd.rank() == 0:
    np.savez(folder + "/weights.npz", *model.get_weights())
"""


def test_a_fit_ends_with_the_weights_of_a_plain_horovod_script(spark: SparkSession, tmp_path: Path) -> None:
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(1)])
    model.save(tmp_path / "model.keras")
    random = np.random.default_rng(0)
    x = random.normal(size=(640, 3)).astype("f4")
    y = (x @ np.array([[2.0], [-1.0], [0.5]], "f4") + 1).astype("f4")
    np.savez(tmp_path / "rows.npz", x=x, y=y)
    with two_gloo_ranks(PLAIN_SCRIPT, FOLDER=str(tmp_path), KERAS_BACKEND="tensorflow") as ranks:
        for rank in ranks:
            _, log = rank.communicate(timeout=TIMEOUT_S)
            assert rank.returncode == 0, log
    plain = list(np.load(tmp_path / "weights.npz").values())
    rows = [(*map(float, features), float(label[0])) for features, label in zip(x, y, strict=True)]
    df = spark.createDataFrame(rows, "a double, b double, c double, y double")

    for allreduce in ("horovod", "shared_memory"):
        fitted = KerasEstimator(
            num_proc=2,
            store=Store.create(tmp_path / "store"),
            model=model,
            optimizer=keras.optimizers.Adam(0.01),
            loss="mse",
            feature_cols=[["a", "b", "c"]],
            label_cols=["y"],
            batch_size=32,
            epochs=3,
            shuffle=False,
            scale_learning_rate=False,
            allreduce=allreduce,
            verbose=0,
        ).fit(df)
        for found, expected in zip(fitted.getModel().get_weights(), plain, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=allreduce)
    assert not np.allclose(plain[0], model.get_weights()[0], atol=1e-2), "the script has trained"


# Two optimizers in a step, as a GAN has them; gradients that are missing, sparse, or of several dtypes; and several
# batches for an update. Both ways side by side, on the same gradients.
KINDS = """
import horovod.tensorflow as hvd, numpy as np, tensorflow as tf
from hvdspark.estimators.keras.allreduce import HorovodAllreduce, SharedMemoryAllreduce, choose_allreduce
from hvdspark.estimators.keras.optimizer import GradientReducer, StepRows
from hvdspark.worker.session import horovod_session

class Recorder:
    def __init__(self, variables):
        self.applied = [tf.Variable(tf.zeros(v.shape, v.dtype)) for v in variables]
        self.index = {id(v): i for i, v in enumerate(variables)}

    def apply(self, grads, trainable_variables=None):
        for grad, variable in zip(grads, trainable_variables, strict=True):
            self.applied[self.index[id(variable)]].assign_add(tf.convert_to_tensor(grad))

def train(allreduce, passes):
    dtypes = ["float32", "float16", "bfloat16", "float64", "float32", "float32"]
    shapes = [(3, 5), (7,), (2, 2), (4,), (2_000_000, 3), (2,)]
    variables = [tf.Variable(tf.zeros(s, d)) for s, d in zip(shapes, dtypes)]
    reducers, recorders = [], []
    for _ in range(2):
        recorder = Recorder(variables)
        reducer = GradientReducer(allreduce, passes)
        reducer.attach(recorder, variables)
        reducers.append(reducer)
        recorders.append(recorder)

    @tf.function
    def take(step):
        for number, (reducer, recorder) in enumerate(zip(reducers, recorders)):
            reducer.begin(StepRows(tf.constant(1.0 + hvd.rank()), tf.constant(3.0), (step + 1) % passes == 0))
            value = tf.cast(step + 1 + number + 10 * hvd.rank(), tf.float32)
            grads = [tf.cast(tf.fill(v.shape, value), v.dtype) for v in variables[:4]]
            rows = tf.constant([0, 9 + hvd.rank()])
            sparse = tf.IndexedSlices(tf.fill((2, 3), value), rows, tf.constant([2_000_000, 3]))
            recorder.apply([*grads, sparse, None], variables)

    for step in range(4):
        take(tf.constant(step))
    return [np.asarray(tf.cast(v, tf.float64)) for recorder in recorders for v in recorder.applied]

with horovod_session(hvd) as session:
    tiny = [tf.Variable(tf.zeros((3,)), name="tiny")]
    shared = choose_allreduce("shared_memory", session, tiny, "none")
    assert isinstance(shared, SharedMemoryAllreduce)
    horovod = HorovodAllreduce(hvd)
    for passes in (1, 2):
        for one, two in zip(train(horovod, passes), train(shared, passes), strict=True):
            np.testing.assert_allclose(one, two, rtol=1e-2)
            assert one.any() or one.shape == (2,)
    assert session.any(hvd.rank() == 1, "one") and not session.any(False, "none")
"""


def test_both_ways_average_every_kind_of_gradient_alike() -> None:
    with two_gloo_ranks(KINDS, warm=True, KERAS_BACKEND="tensorflow") as ranks:
        for rank in ranks:
            _, log = rank.communicate(timeout=TIMEOUT_S)
            assert rank.returncode == 0, log


CHOICE = """
import logging, os
logging.basicConfig(level=logging.INFO)
import horovod.tensorflow as hvd, tensorflow as tf
from hvdspark.estimators.keras.allreduce import choose_allreduce
from hvdspark.worker.session import horovod_session

with horovod_session(hvd) as session:
    chosen = choose_allreduce("auto", session, [tf.Variable(tf.zeros((int(os.environ["VALUES"]),)))], "none")
    total = float(hvd.allreduce(tf.constant(float(hvd.rank() + 1)), op=hvd.Sum, name="users_own"))
    print(type(chosen).__name__, total)
"""


def choices(values: int) -> tuple[str, str, str]:
    """Let two ranks choose for a model of so many values; returns what each printed, and the first one's log."""
    with two_gloo_ranks(CHOICE, warm=True, KERAS_BACKEND="tensorflow", VALUES=str(values)) as ranks:
        (first, log), (second, _) = [rank.communicate(timeout=TIMEOUT_S) for rank in ranks]
    return first, second, log


def test_a_small_model_is_averaged_in_shared_memory_and_horovod_stays_at_hand() -> None:
    first, second, log = choices(100)
    assert first == second == "SharedMemoryAllreduce 3.0\n", log
    assert "of this model in" not in log


def test_a_larger_model_is_averaged_by_what_a_trial_finds_faster() -> None:
    first, second, log = choices(1_000_000)
    assert first == second
    chosen = "Horovod" if "Horovod" in first else "shared memory"
    assert f"gradients are averaged by {chosen}: of this model in" in log


LOST_IN_A_STEP = """
import os
import horovod.tensorflow as hvd, tensorflow as tf
from hvdspark.estimators.keras.allreduce import choose_allreduce
from hvdspark.worker.rank import _is_peer_error
from hvdspark.worker.session import horovod_session

with horovod_session(hvd) as session:
    allreduce = choose_allreduce("shared_memory", session, [tf.Variable(tf.zeros((100,)))], "none")

    grads = tf.ones((100,))

    @tf.function
    def steps(count):
        def step(number, grad):
            return number + 1, *allreduce.average([grad], "step")

        # AutoGraph, which makes such loops, needs a program's file.
        tf.while_loop(lambda number, _: number < count, step, [0, grads])

    steps(tf.constant(10))
    print("ready", flush=True)
    try:
        steps(tf.constant(1_000_000_000))
    except tf.errors.OpError as exc:
        print("a peer is gone" if _is_peer_error(exc) else repr(exc), flush=True)
        os._exit(1)
"""


def test_a_rank_killed_within_a_step_is_an_error_of_a_lost_peer_for_the_other() -> None:
    with two_gloo_ranks(LOST_IN_A_STEP, warm=True, KERAS_BACKEND="tensorflow") as (first, second):
        assert first_line(first) == first_line(second) == "ready"
        os.kill(second.pid, signal.SIGKILL)
        found, log = first.communicate(timeout=30)
    assert found == "a peer is gone\n", log
    assert first.returncode == 1
