"""What is to be seen of a fit: while it runs, on the model, in the run's folder, in TensorBoard, on a timeline."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import keras
import pytest
from faulty_fits import EPOCHS, Fault, die, estimator, rows_of
from hvdspark.estimators import KerasModel
from pyspark.sql import DataFrame, SparkSession
from standalone import wait_for

from hvdspark import Store
from hvdspark.history import read_history, read_progress
from hvdspark.runs import read_record

NAP_S = 0.1


class Nap(keras.callbacks.Callback):
    """Makes the second rank slow."""

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if os.environ["HOROVOD_RANK"] == "1":
            time.sleep(NAP_S)


@pytest.fixture(scope="module")
def df(spark: SparkSession) -> DataFrame:
    return rows_of(spark)


def test_a_fit_leaves_its_history_and_names_the_slow_rank(
    df: DataFrame, store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="hvdspark.estimators.progress")
    model = estimator(store, Nap(), verbose=1, tensorboard=True, timeline=True, run_id="slow").fit(df)

    epochs = read_history(store, "slow")
    assert epochs == model.epochs
    history = model.getHistory()
    assert {"loss", "mae", "val_loss", "val_mae"} <= set(history)
    for name, values in history.items():
        assert [record.metrics[name] for record in epochs] == values, name
    assert [record.epoch for record in epochs] == list(range(1, EPOCHS + 1))
    for record in epochs:
        assert sum(record.metrics.values()) > 0
        assert 0 < record.learning_rate <= 0.02
        assert record.validation_s > 0
        assert 500 < record.rows < 640
        assert record.rows_per_s == pytest.approx(record.rows / record.seconds)
        assert [times.rank for times in record.ranks] == [0, 1]
        for times in record.ranks:
            assert times.allreduce_s > 0
            assert times.seconds == pytest.approx(times.data_wait_s + times.allreduce_s + times.compute_s)
    # Functions are traced in the first epoch, which takes either rank seconds.
    progress = read_progress(store, "slow")
    for record in epochs[1:]:
        fast, slow = record.ranks
        assert record.slowest == slow
        assert slow.own_s >= progress.steps * NAP_S
        assert fast.allreduce_s > slow.allreduce_s
    assert f"1 on {epochs[1].ranks[1].host}" in model.summary().splitlines()[2]

    assert (progress.epoch, progress.epochs, progress.step) == (EPOCHS, EPOCHS, progress.steps)
    told = [entry.getMessage() for entry in caplog.records]
    assert [re.match(r"slow: epoch (\d)/4: loss ", text)[1] for text in told] == ["1", "2", "3", "4"]

    model.write().save(str(tmp_path / "model"))
    loaded = KerasModel.load(str(tmp_path / "model"))
    assert loaded.epochs == epochs
    assert str(loaded.summary()) == str(model.summary())
    check_timeline(store)
    check_tensorboard(store, history)


def check_timeline(store: Store) -> None:
    (name,) = store.list("runs", "slow", "timeline")
    events = json.loads(store.read_bytes("runs", "slow", "timeline", name))
    named = {
        event["args"]["name"] for event in events if event.get("name") == "process_name" and "name" in event["args"]
    }
    assert any("hvdspark_gradients" in found for found in named)


def check_tensorboard(store: Store, history: dict[str, list[float]]) -> None:
    """Start the command on the run, and ask it for what it would draw."""
    command = [sys.executable, "-m", "hvdspark", "tensorboard", "--run", "slow", "--store", store.url, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        said = server.stdout.readline()
        url = re.fullmatch(r"slow: (http://\S+/)\n", said)[1]
        assert "127.0.0.1" in url

        def ask(path: str) -> Any:
            with urllib.request.urlopen(url + path, timeout=60) as answer:
                return json.load(answer)

        wait_for(lambda: len(ask("data/plugin/scalars/tags")) == 2, "both runs in TensorBoard")
        tags = ask("data/plugin/scalars/tags")
        assert {"epoch_loss", "epoch_mae", "epoch_learning_rate"} <= set(tags["train"])
        points = ask("data/plugin/scalars/scalars?run=validation&tag=epoch_loss")
        assert [(step, value) for _, step, value in points] == [
            (step, pytest.approx(value, rel=1e-6)) for step, value in enumerate(history["val_loss"])
        ]
        server.terminate()
        _, errors = server.communicate(timeout=60)
    finally:
        server.kill()
    assert server.returncode == 0, errors


def test_a_terminal_shows_a_bar_that_goes_on_after_a_restart(
    df: DataFrame, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Fault(tmp_path / "mark", 1, 2, 3, die)
    with terminal() as (screen, seen):
        monkeypatch.setattr(sys, "stderr", screen)
        model = estimator(store, fault, Nap(), verbose=1, run_id="bar").fit(df)
    assert (tmp_path / "mark").exists()

    shown = re.findall(r"epoch (\d)/4 step (\d+)/9: +(\d+)%\|(\S*) *\| \S+<\S+ ([\d,]+) rows/s(, loss \d)?", seen())
    places = [(int(epoch) - 1) * 9 + int(step) for epoch, step, *_ in shown]
    assert len(set(places)) > 3, seen()
    assert [int(percent) for _, _, percent, *_ in shown] == [round(100 * place / 36) for place in places]
    assert places[-1] == 36
    assert all(loss for *_, loss in shown[-2:])
    assert seen().count("\n") == 1, "it is one bar, on one line"

    epochs = read_history(store, "bar")
    assert [record.epoch for record in epochs] == [1, 2, 3, 4]
    assert [record.metrics["loss"] for record in epochs] == model.getHistory()["loss"]
    assert [record.started for record in epochs] == sorted(record.started for record in epochs)
    # These averages were made in shared memory.
    assert all(times.allreduce_s > 0 for record in epochs for times in record.ranks)
    assert read_record(store, "bar").state == "finished"


@contextmanager
def terminal() -> Iterator[tuple[TextIO, Any]]:
    """Provide a pseudo-terminal, and a function that returns what has been shown on it."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    found: list[bytes] = []

    def read() -> None:
        try:
            while data := os.read(master, 65536):
                found.append(data)
        except OSError:  # how a terminal ends that nobody has open
            pass

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    with os.fdopen(slave, "w") as screen:
        yield screen, lambda: b"".join(found).decode()
    reader.join(30)
    os.close(master)
