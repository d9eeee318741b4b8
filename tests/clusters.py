"""Real Spark clusters of this machine: executors in processes of their own, Horovod over Gloo between them."""

from __future__ import annotations

import contextlib
import os
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType

import cloudpickle
import psutil
import pytest
from hvdspark.estimators import KerasEstimator
from pyspark.sql import SparkSession

from hvdspark import Store
from hvdspark.worker.job import Job

TWO_EXECUTORS = "local-cluster[2,1,2048]"

# What a fit's ranks import ahead: functions that say the same run in forks of the parents that fits leave.
KERAS_RANK = Job(KerasEstimator._trainer).modules

# What executors run, so that nothing of it is overlooked when it stays.
INTERPRETERS = {sys.executable}


@pytest.fixture(scope="session", autouse=True)
def _environment() -> None:
    """Spark's Python workers run on this interpreter, and nothing listens beyond the loopback."""
    os.environ["PYSPARK_PYTHON"] = sys.executable
    os.environ["SPARK_LOCAL_IP"] = "127.0.0.1"
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "2"


def new_session(master: str, settings: Mapping[str, str] | None = None) -> SparkSession:
    """Make a session on a cluster of this machine."""
    builder = (
        SparkSession.builder.master(master)
        .appName("hvdspark-e2e")
        .config("spark.ui.enabled", "false")
        .config("spark.ui.showConsoleProgress", "false")
        .config("spark.sql.shuffle.partitions", "4")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.driver.bindAddress", "127.0.0.1")
    )
    return builder.config(map=dict(settings or {})).getOrCreate()


def gpu_conf(folder: Path, discovery: str) -> dict[str, str]:
    """Return the settings of a cluster whose executors have a GPU each, as a script that Spark runs finds them."""
    script = folder / "gpus"
    script.write_text(discovery)
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return {
        "spark.worker.resource.gpu.amount": "1",
        "spark.worker.resource.gpu.discoveryScript": str(script),
        "spark.executor.resource.gpu.amount": "1",
        "spark.task.resource.gpu.amount": "1",
    }


@pytest.fixture(scope="session")
def _shared() -> Iterator[dict[str, SparkSession]]:
    """The session that modules share, by its master."""
    shared: dict[str, SparkSession] = {}
    yield shared
    _stop(shared)


def sharing_first(items: list[pytest.Function], folder: Path) -> None:
    """Put the modules of a lane that share a session before its others, so that it and its warm pool start once."""
    places = [place for place, item in enumerate(items) if folder in item.path.parents]
    lane = [items[place] for place in places]
    sharing = {item.module for item in lane if "spark" in item.fixturenames and _shares_a_session(item.module)}
    ordered = sorted(lane, key=lambda item: item.module not in sharing)
    for place, item in zip(places, ordered, strict=True):
        items[place] = item


def _shares_a_session(module: ModuleType) -> bool:
    """Whether a module takes the session as it is where nobody says otherwise, see :func:`spark`."""
    is_own = hasattr(module, "spark_conf") or getattr(module, "OWN_SESSION", False)
    return not is_own and getattr(module, "MASTER", TWO_EXECUTORS) == TWO_EXECUTORS


@pytest.fixture(scope="module")
def spark(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    _environment: None,
    _shared: dict[str, SparkSession],
) -> Iterator[SparkSession]:
    """A cluster of two executors with a slot each; a module that wants another says so with ``MASTER``.

    Modules that want the same one after the other share it, but for one that says ``OWN_SESSION = True``, or gives
    settings of its own with ``spark_conf``, a function of a folder for files that they name.
    """
    own = getattr(request.module, "spark_conf", lambda _folder: {})(tmp_path_factory.mktemp("spark"))
    master = getattr(request.module, "MASTER", TWO_EXECUTORS)
    is_alone = bool(own) or getattr(request.module, "OWN_SESSION", False)
    if is_alone or master not in _shared:
        _stop(_shared)
        _shared[master] = new_session(master, own)
        _shared[master].sparkContext.setLogLevel("OFF")
    yield _shared[master]
    if is_alone:
        _stop(_shared, own)


def _stop(shared: dict[str, SparkSession], own: Mapping[str, str] = MappingProxyType({})) -> None:
    """Stop the session that is up."""
    while shared:
        _, session = shared.popitem()
        jvm = session.sparkContext._jvm
        session.stop()
        for name in own:  # the settings of the first session become properties of the JVM, which serves the next ones
            jvm.System.clearProperty(name)
        # The warm pool lives as long as the executors, and no longer; a parent that still imports ends after that.
        _, alive = psutil.wait_procs(warm_parents(), timeout=60)
        assert alive == []


@pytest.fixture(autouse=True, scope="module")
def _travels_by_value(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test module defines is not importable in the executors, as a notebook's cells are not."""
    cloudpickle.register_pickle_by_value(request.module)
    yield
    cloudpickle.unregister_pickle_by_value(request.module)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "store")


def own_processes() -> Iterator[tuple[psutil.Process, list[str]]]:
    """Go through the interpreters' processes with their command lines, those whose parents are gone included.

    Lanes that run beside this one have a namespace of processes of their own, which is seen from here.
    """
    here = Path("/proc/self/ns/pid").readlink()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, OSError):
            command = process.cmdline()
            if INTERPRETERS & set(command[:1]) and Path(f"/proc/{process.pid}/ns/pid").readlink() == here:
                yield process, command


def training_processes() -> list[psutil.Process]:
    """List the training processes, guards and servers of these interpreters, cold and warm ones."""
    return [
        process
        for process, command in own_processes()
        if process.name() in ("hvdspark-rank", "hvdspark-guard")
        or "hvdspark.worker" in command
        or any(part.endswith(("hvdspark/launch/guard.py", "hvdspark/launch/pmix.py")) for part in command)
    ]


def warm_parents() -> list[psutil.Process]:
    """List the warm pool's parents, which stay for the next fit."""
    return [process for process, command in own_processes() if "hvdspark.worker.warm" in command[:3]]


@pytest.fixture(autouse=True)
def _leaves_no_process() -> Iterator[None]:
    """No test may leave a training process behind, whatever it did."""
    yield
    _, alive = psutil.wait_procs(training_processes(), timeout=10)
    assert alive == []
