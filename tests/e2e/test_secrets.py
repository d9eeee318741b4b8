"""What two real fits, one good and one that fails, leave behind and show: no secrets, and no open doors."""

from __future__ import annotations

import collections
import contextlib
import itertools
import logging
import os
import socket
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import keras
import psutil
import pytest
from hvdspark.estimators import KerasEstimator, KerasModel
from pyspark.sql import SparkSession

from hvdspark import Store
from hvdspark.errors import WorkerFailedError

# What strangers say at the doors: nothing, a pickle, a request, a rank's number without the token.
SAID = (b"", b"\x80\x04\x95N.", b"GET /global/0 HTTP/1.1\r\n\r\n", b"0" * 32 + b" 1\nring\n")
CROWD = 1000  # at each door

SECRETS = {"a storage option": "st0rage-m4rker", "a variable": "v4riable-m4rker"}


class Looks(keras.callbacks.Callback):
    """In the rank: keeps what it was given, and who is let in where the ranks have met; the first rank may fail."""

    def __init__(self, found: Path, *, fails: bool) -> None:
        super().__init__()
        self._found, self._fails = str(found), fails

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if os.environ["HOROVOD_RANK"] != "0":
            return
        try:
            address = ("127.0.0.1", int(os.environ["HOROVOD_GLOO_RENDEZVOUS_PORT"]))
            socket.create_connection(address, timeout=5).close()
            met = "open"
        except ConnectionRefusedError:
            met = "shut"
        Path(self._found).write_text(f"{os.environ['PASSWORD']} {met}")
        if self._fails:
            raise LookupError("the user's own mistake")


@dataclass
class Seen:
    """What anybody could see while and after the fits ran, by where."""

    texts: dict[str, str] = field(default_factory=dict)
    doors: set[int] = field(default_factory=set)

    def check(self) -> None:
        assert all(text for text in self.texts.values())
        for kind, secret in SECRETS.items():
            assert [place for place, text in self.texts.items() if secret in text] == [], kind


class Watch:
    """Collects the command lines of all processes of this machine, and crowds the doors of the tasks meanwhile."""

    def __init__(self) -> None:
        self.commands: set[str] = set()
        self.doors: collections.Counter[int] = collections.Counter()
        self._crowd: list[socket.socket] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        for connection in self._crowd:
            connection.close()

    def _run(self) -> None:
        while not self._ended.wait(0.05):
            for process in psutil.process_iter(["cmdline", "name"]):
                command = " ".join([process.info["name"] or "", *(process.info["cmdline"] or [])])
                self.commands.add(command)
                if "pyspark.daemon" in command:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        self._visit(process)

    def _visit(self, process: psutil.Process) -> None:
        """Come to the doors of a task, which is a child of Spark's daemon; the daemon's own is not ours."""
        parent = process.parent()
        if parent is None or "pyspark.daemon" not in parent.cmdline():
            return
        for listener in process.net_connections("tcp"):
            if listener.status != psutil.CONN_LISTEN or self.doors[listener.laddr.port] >= CROWD:
                continue
            for source, said in itertools.product(("127.0.0.1", "127.0.0.9"), SAID):
                self.doors[listener.laddr.port] += 1
                with contextlib.suppress(OSError):
                    connection = socket.create_connection(listener.laddr, timeout=1, source_address=(source, 0))
                    self._crowd.append(connection)
                    connection.sendall(said)


def estimator(store: Store, looks: Looks, **overrides: Any) -> KerasEstimator:
    keras.utils.set_random_seed(0)
    settings: dict[str, Any] = {
        "num_proc": 2,
        "store": store,
        "model": keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]),
        "optimizer": "sgd",
        "loss": "mse",
        "feature_cols": ["x"],
        "label_cols": ["y"],
        "batch_size": 16,
        "backend_env": {"PASSWORD": SECRETS["a variable"]},
        "callbacks": [looks],
        "checkpoint_steps": 1,
    }
    return KerasEstimator(**{**settings, **overrides})


@pytest.fixture(scope="module")
def fitted(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> tuple[Seen, Store, Path]:
    folder = tmp_path_factory.mktemp("secrets")
    store = Store.create(folder / "store", {"password": SECRETS["a storage option"]})
    df = spark.range(64, numPartitions=2).selectExpr("float(id) / 64 AS x", "float(id) / 32 AS y")
    seen, records = Seen(), list[str]()
    handler = logging.Handler(logging.DEBUG)
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("hvdspark")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    descriptions = list[str]()
    try:
        with Watch() as watch:
            good = estimator(store, Looks(folder / "good", fails=False), run_id="good")
            model = good.fit(df)
            bad = estimator(store, Looks(folder / "bad", fails=True), run_id="bad")
            with pytest.raises(WorkerFailedError) as caught:
                bad.fit(df)
        tracker = spark.sparkContext._jsc.sc().statusStore()  # type: ignore[attr-defined]
        jobs = tracker.jobsList(None)
        descriptions += [str(jobs.apply(place).description()) for place in range(jobs.size())]
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)
    assert isinstance(model, KerasModel)
    model.save(str(folder / "model"))
    error, seen.doors = caught.value, set(watch.doors)
    seen.texts = {
        "command lines": "\n".join(watch.commands),
        "log": "\n".join(records),
        "job descriptions": "\n".join(descriptions),
        "error": f"{error}{error!r}{error.fields}",
        "representations": f"{good!r}{bad!r}{model!r}{store!r}{store.ref()!r}{good._launch_options('run', store)!r}",
    }
    for file in sorted(path for root in ("store", "model") for path in (folder / root).rglob("*") if path.is_file()):
        seen.texts[str(file.relative_to(folder))] = f"{file}\n{file.read_bytes().decode('latin-1')}"
    return seen, store, folder


def test_secrets_reach_the_ranks_and_nothing_that_others_read(fitted: tuple[Seen, Store, Path]) -> None:
    seen, _, folder = fitted
    assert (folder / "good").read_text().split()[0] == SECRETS["a variable"]
    places = " ".join(seen.texts)
    for expected in ("good/logs/rank-0.log", "bad/logs/rank-1.log", "good/model.keras", "manifest.json", "state-"):
        assert expected in places
    assert "hvdspark.worker" in seen.texts["command lines"]
    assert "the user's own mistake" in seen.texts["error"]
    seen.check()


def test_crowds_at_the_doors_disturb_no_fit(fitted: tuple[Seen, Store, Path]) -> None:
    seen, store, _ = fitted
    # Each fit has had a rendezvous and an alarm. Watch comes by now and then, so it may miss the one that shuts soon.
    assert len(seen.doors) >= 2
    assert store.exists("runs/good/model.keras")


def test_when_the_ranks_have_met_for_good_nobody_else_gets_in(fitted: tuple[Seen, Store, Path]) -> None:
    _, _, folder = fitted
    assert [(folder / name).read_text().split()[1] for name in ("good", "bad")] == ["shut", "shut"]


def test_all_that_a_fit_leaves_is_for_its_user_alone(fitted: tuple[Seen, Store, Path]) -> None:
    _, store, _ = fitted
    root = Path(store.url)
    open_to_others = [path for path in (root, *root.rglob("*")) if path.stat().st_mode & 0o077]
    assert open_to_others == []
