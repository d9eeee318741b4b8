"""A host that is cut off or dies while ranks train: the fit goes on or fails within a bound, and nothing stays."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np
import psutil
import pytest
from clusters import training_processes
from hvdspark.estimators import KerasEstimator
from networks import SLOTS, Host, Site
from pyspark.sql import DataFrame, SparkSession
from standalone import wait_for

from hvdspark import Store
from hvdspark.errors import NotEnoughSlotsError, WorkerFailedError
from hvdspark.launch import barrier
from hvdspark.launch.slots import check_slots, count_slots

EPOCHS, ROWS = 4, 480

# A cut is noticed within 11 s, and tasks that do not answer are given up 15 s later; the rest is a busy machine.
BOUND_S = 60.0
FLAP_S = 3.0


class Pause(keras.callbacks.Callback):
    """Stops the first rank at the end of a step, until the test lets it go on; the others wait in their allreduce."""

    def __init__(self, folder: Path, epoch: int, step: int = 3) -> None:
        super().__init__()
        self._folder, self._epoch, self._step, self._now = str(folder), epoch, step, 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._now = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        folder = Path(self._folder)
        if (int(os.environ["HOROVOD_RANK"]), self._now, batch) == (0, self._epoch, self._step):
            (folder / "name").write_text(os.uname().nodename)
            (folder / "name").rename(folder / "here")
            while not (folder / "go").exists():
                time.sleep(0.01)


class AtPause:
    """Does something to the hosts while the first rank pauses, and then lets it go on.

    Parameters
    ----------
    folder
        The pause's own.
    act
        Is given the name of the first rank's host.
    """

    def __init__(self, folder: Path, epoch: int, act: Callable[[str], None]) -> None:
        folder.mkdir()
        self.callback = Pause(folder, epoch)
        self.first_host = ""
        self._folder, self._act = folder, act
        self._done = 0.0
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    @property
    def since_s(self) -> float:
        """Seconds since it was done."""
        assert self._done
        return time.monotonic() - self._done

    def _work(self) -> None:
        wait_for((self._folder / "here").exists, "the pause")
        self.first_host = (self._folder / "here").read_text()
        self._done = time.monotonic()
        self._act(self.first_host)
        (self._folder / "go").touch()


@pytest.fixture(scope="module")
def df(spark: SparkSession) -> DataFrame:
    random = np.random.default_rng(5)
    rows = [(*map(float, row), float(row[0] - 2 * row[1])) for row in random.normal(size=(ROWS, 2))]
    return spark.createDataFrame(spark.sparkContext.parallelize(rows, 3), "a double, b double, y double")


@pytest.fixture(autouse=True)
def _all_slots(spark: SparkSession, site: Site) -> Iterator[None]:
    """Hosts come back for the next test."""
    wait_for(lambda: count_slots(spark) == sum(SLOTS.values()), "all slots")
    yield
    for host in (site.alpha, site.beta):
        site.net.plug(host, into=True)


def fit(df: DataFrame, store: Store, *callbacks: Any, **keywords: Any) -> Any:
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(1)]
    settings: dict[str, Any] = {"num_proc": 3, **keywords}
    estimator = KerasEstimator(
        store=store,
        model=keras.Sequential([keras.Input((2,)), *layers]),
        optimizer=keras.optimizers.Adam(0.01),
        loss="mse",
        feature_cols=[["a", "b"]],
        label_cols=["y"],
        batch_size=16,
        epochs=EPOCHS,
        verbose=0,
        run_id="run",
        callbacks=list(callbacks),
        **settings,
    )
    return estimator.fit(df)


def log_of(store: Store, folder: str = "logs") -> str:
    return Path(store.path("runs/run", folder, "rank-0.log")).read_text()


@pytest.fixture(scope="module")
def undisturbed(df: DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Any:
    store = Store.create(tmp_path_factory.mktemp("undisturbed") / "store")
    model = fit(df, store)
    assert "controller gloo (as asked for), TCP over eth0" in log_of(store)
    losses = model.getHistory()["loss"]
    assert losses[-1] < losses[0] / 2
    return model


def assert_same(found: Any, expected: Any) -> None:
    assert found.getHistory()["loss"] == pytest.approx(expected.getHistory()["loss"], rel=1e-3, abs=1e-5)
    for mine, theirs in zip(found.getModel().weights, expected.getModel().weights, strict=True):
        np.testing.assert_allclose(np.asarray(mine), np.asarray(theirs), rtol=1e-3, atol=1e-5)


def assert_nothing_trains_on(host: Host) -> None:
    here = {process.pid for process in host.processes()}
    _, alive = psutil.wait_procs([process for process in training_processes() if process.pid in here], timeout=10)
    assert alive == []


@pytest.mark.parametrize(("controller", "said"), [("gloo", "gloo"), ("mpi", "mpi by MPICH")])
def test_hosts_train_to_the_same_weights_and_a_network_that_is_back_soon_disturbs_nothing(
    df: DataFrame, store: Store, site: Site, tmp_path: Path, undisturbed: Any, controller: str, said: str
) -> None:
    def flap(_: str) -> None:
        site.net.plug(site.beta, into=False)
        back = threading.Timer(FLAP_S, site.net.plug, (site.beta,), {"into": True})
        back.start()

    pause = AtPause(tmp_path / "flap", 1, flap)
    verbose = {"UCX_PROTO_INFO": "y"} if controller == "mpi" else {}
    assert_same(fit(df, store, pause.callback, controller=controller, backend_env=verbose), undisturbed)
    assert pause.since_s > FLAP_S
    assert "attempt-2" not in store.list("runs/run/logs")
    log = log_of(store)
    assert f"controller {said} (as asked for), TCP over eth0" in log
    if controller == "mpi":
        # What UCX itself says: between hosts nothing else.
        tables = re.findall(r"inter-node cfg#.*\n(?:(?!.*cfg#).*\n)*", log)
        assert {transport for table in tables for transport in re.findall(r"\| (\w+/\w+) +\|$", table, re.M)} == {
            "tcp/eth0"
        }


def test_hosts_that_both_reach_the_driver_but_not_each_other_say_so(
    df: DataFrame, store: Store, site: Site, tmp_path: Path
) -> None:
    pause = AtPause(tmp_path / "cut", 1, lambda _: site.net.plug(site.beta, into=False, interfaces=["eth1"]))
    message = r"^rank \d on \S+: stopped, because the connection to rank \d on \S+ was lost"
    with pytest.raises(WorkerFailedError, match=message) as caught:
        fit(df, store, pause.callback, nics=["eth1"], max_restarts=0)
    assert pause.since_s < BOUND_S
    assert caught.value.is_passing
    assert caught.value.failures.keys() == {0, 1, 2}
    assert "TCP over eth1" in log_of(store)


def test_a_fit_goes_on_without_a_host_that_is_cut_off(
    df: DataFrame, store: Store, site: Site, tmp_path: Path, undisturbed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The first rank tells the other of its host at once, so it takes no more until both have answered.
    monkeypatch.setattr(barrier, "Watch", partial(barrier.Watch, silence_s=5.0))
    pause = AtPause(tmp_path / "cut", 2, lambda _: site.net.plug(site.beta, into=False))
    model = fit(df, store, pause.callback)
    assert pause.since_s < BOUND_S
    assert_nothing_trains_on(site.beta)
    assert_same(model, undisturbed)
    log = log_of(store, "logs/attempt-2")
    assert "gradients are averaged in memory that the ranks of the host share" in log
    assert "going on from the checkpoint at epoch 3, step 0" in log


def test_the_error_names_the_host_that_is_cut_off_where_the_others_are_too_few(
    df: DataFrame, store: Store, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Nobody comes in the lost ones' place, so it is not waited for as long as usual.
    monkeypatch.setattr(barrier, "check_slots", lambda session, size, _: check_slots(session, size, 1.0))
    pause = AtPause(tmp_path / "cut", 1, lambda first: site.net.plug(site.net.hosts[first], into=False))
    with pytest.raises(WorkerFailedError, match=r"^rank 0 on \S+: there was no answer for 15 s") as caught:
        fit(df, store, pause.callback, controller="mpi", num_proc=4)
    assert pause.since_s < BOUND_S
    first = site.net.hosts[pause.first_host]
    assert_nothing_trains_on(first)
    assert re.match(rf"rank 0 on ({first.name}|{first.address}):", str(caught.value))
    assert any("the connection to rank 0 on" in text for text in caught.value.failures.values())
    missing = caught.value.__cause__
    assert isinstance(missing, NotEnoughSlotsError)
    assert (missing.needed, missing.available) == (4, sum(SLOTS.values()) - SLOTS[first.name])


def test_a_fit_goes_on_without_a_host_that_died(
    df: DataFrame, store: Store, site: Site, tmp_path: Path, undisturbed: Any
) -> None:
    pause = AtPause(tmp_path / "dead", 2, lambda _: site.beta.kill())
    try:
        assert_same(fit(df, store, pause.callback), undisturbed)
        assert pause.since_s < BOUND_S
        assert "going on from the checkpoint at epoch 3, step 0" in log_of(store, "logs/attempt-2")
        # There is one host now.
        alone = Store.create(tmp_path / "alone")
        assert_same(fit(df, alone), undisturbed)
        assert "gradients are averaged in memory that the ranks of the host share" in log_of(alone)
    finally:
        site.start_workers(site.beta)
