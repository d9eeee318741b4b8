"""The warm pool: who serves whom, for how long, and what happens when it fails. Real processes throughout."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest

from hvdspark.launch import pool
from hvdspark.launch.child import Child, Patience
from hvdspark.launch.failures import Outcome
from hvdspark.launch.process import Recipe, recipe_of
from hvdspark.plan import RankContext
from hvdspark.worker.job import Job

CONTEXT = RankContext(rank=0, size=1, local_rank=0, local_size=1, cross_rank=0, cross_size=1, host="here")
FRAMEWORK = """
    import os
    with open(os.environ["IMPORTS"], "a") as log:
        log.write(f"{os.getpid()}\\n")
    seen = []
"""


@pytest.fixture(autouse=True)
def _own_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of sockets for this test alone, whose parents end with it."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    for process in pool._started:
        process.kill()
        process.wait()
    pool._started.clear()


@pytest.fixture
def imports(tmp_path: Path) -> Path:
    """Where the module ``framework`` notes each process that imports it."""
    (tmp_path / "framework.py").write_text(textwrap.dedent(FRAMEWORK))
    log = tmp_path / "imports"
    log.touch()
    return log


@pytest.fixture
def recipe(imports: Path) -> Recipe:
    return recipe_with(imports)


def recipe_with(imports: Path, **environment: str) -> Recipe:
    path = os.pathsep.join([str(imports.parent), *filter(None, sys.path)])
    return recipe_of({"IMPORTS": str(imports), "PYTHONPATH": path, **environment}, ("framework",))


def run(recipe: Recipe, function: Callable[..., Any], *args: Any, start_timeout_s: float = 60) -> Any:
    with Child(recipe, warm=True) as child:
        outcome = child.run(cloudpickle.dumps(Job(function, args)), CONTEXT, {}, None, Patience(start_timeout_s))
    return result_of(outcome)


def result_of(outcome: Outcome) -> Any:
    assert outcome.result is not None, outcome.failure
    return cloudpickle.loads(outcome.result)


def parents() -> list[psutil.Process]:
    """List the parents that this process started and that have not ended."""
    found = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if process.status() != psutil.STATUS_ZOMBIE and "hvdspark.worker.warm" in process.cmdline():
                found.append(process)
    return found


def sockets(folder: Path) -> list[str]:
    return [path.name for path in (folder / f"hvdspark-{os.getuid()}").iterdir() if path.is_socket()]


def wait_until(condition: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def test_ranks_of_one_recipe_share_one_import(recipe: Recipe, imports: Path) -> None:
    def pids() -> tuple[int, int]:
        import framework  # noqa: F401 - is there already

        return os.getpid(), psutil.Process().parent().ppid()

    first, second = run(recipe, pids), run(recipe, pids)
    parent = int(imports.read_text())
    assert (first[1], second[1]) == (parent, parent)
    assert first[0] != second[0]
    assert [process.pid for process in parents()] == [parent]


def test_imports_take_time_from_the_launch_that_waits_for_them(recipe: Recipe) -> None:
    def waited() -> float:
        from hvdspark.worker.imports import waited_s

        return waited_s()

    first, second = run(recipe, waited), run(recipe, waited)
    assert first > 0
    assert second == 0


def test_what_a_rank_does_to_its_process_is_not_seen_by_the_next(recipe: Recipe) -> None:
    def change() -> Any:
        import random

        import framework
        import numpy as np

        found = (list(framework.seen), os.environ.get("DONE"), str(Path.cwd()))
        framework.seen.append(1)
        os.environ["DONE"] = "yes"
        os.chdir("/")
        return found, random.random(), float(np.random.rand())

    first, second = run(recipe, change), run(recipe, change)
    assert first[0] == second[0] == ([], None, str(Path.cwd()))
    assert first[1] != second[1]
    assert first[2] != second[2]


def test_what_others_do_to_the_tasks_environment_is_no_reason_for_another_parent(
    imports: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(recipe_with(imports), lambda: 1) == 1
    monkeypatch.setenv("TF2_BEHAVIOR", "1")  # as TensorFlow does when transform runs in the same interpreter
    assert run(recipe_with(imports), lambda: os.environ.get("TF2_BEHAVIOR")) is None
    assert len(imports.read_text().split()) == 1


def test_ranks_and_guards_are_told_from_their_parent_by_name(recipe: Recipe) -> None:
    def names() -> list[str]:
        own = psutil.Process()
        return [process.name() for process in (own, *own.parents()[:2])]

    assert run(recipe, names) == ["hvdspark-rank", "hvdspark-guard", "hvdspark-pool"]


def test_another_environment_gets_another_parent_and_an_executor_keeps_few(imports: Path, tmp_path: Path) -> None:
    def ask() -> str:
        return os.environ["LEVEL"]

    levels = ["1", "2", "1", "3"]
    assert [run(recipe_with(imports, LEVEL=level), ask) for level in levels] == levels
    assert len(imports.read_text().split()) == 3
    wait_until(lambda: len(parents()) == pool.MAX_PARENTS)
    assert len(sockets(tmp_path)) == pool.MAX_PARENTS


def test_the_parent_that_was_used_last_stays_though_it_is_the_oldest(imports: Path) -> None:
    for level in ("1", "2", "1", "3", "1"):
        assert run(recipe_with(imports, LEVEL=level), lambda: os.environ["LEVEL"]) == level
    assert len(imports.read_text().split()) == 3


def test_a_parent_that_goes_as_room_is_made_is_no_hindrance(
    imports: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert run(recipe_with(imports, LEVEL="1"), lambda: 1) == 1
    listdir = os.listdir

    def list_as_it_goes(folder: int) -> list[str]:
        names = listdir(folder)
        for name in set(names) - {"lock"}:
            os.unlink(name, dir_fd=folder)
        return names

    monkeypatch.setattr(os, "listdir", list_as_it_goes)
    pid = run(recipe_with(imports, LEVEL="2"), lambda: psutil.Process().parent().ppid())
    assert str(pid) in imports.read_text().split()
    assert caplog.text == ""


def test_what_killed_executors_left_is_removed_and_nothing_else(imports: Path, tmp_path: Path) -> None:
    assert run(recipe_with(imports, LEVEL="1"), lambda: 1) == 1
    folder = tmp_path / f"hvdspark-{os.getuid()}"
    # Of an executor that is none: the number is more than any process has.
    (killed, busy) = (socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX))
    killed.bind(str(folder / "4194305-killed"))
    killed.close()
    with busy:
        busy.bind(str(folder / "4194305-busy"))
        busy.listen()
        assert run(recipe_with(imports, LEVEL="2"), lambda: 2) == 2
        assert "4194305-busy" in sockets(tmp_path)
    assert "4194305-killed" not in sockets(tmp_path)
    assert (folder / "lock").is_file()
    assert len(sockets(tmp_path)) == 3


def test_a_parent_that_nobody_needs_ends_and_the_next_task_gets_a_new_one(imports: Path, tmp_path: Path) -> None:
    recipe = recipe_with(imports, **{pool.IDLE_TIMEOUT: "0.2"})
    assert run(recipe, lambda: 1) == 1
    wait_until(lambda: not parents())
    assert sockets(tmp_path) == []
    assert run(recipe, lambda: 2) == 2
    assert len(imports.read_text().split()) == 2


def test_a_parent_can_be_started_ahead(recipe: Recipe, imports: Path) -> None:
    pool.prewarm(recipe)
    pool.prewarm(recipe)
    wait_until(lambda: imports.read_text() != "")
    assert run(recipe, lambda: psutil.Process().parent().ppid()) == int(imports.read_text())


def test_a_child_that_gets_no_work_leaves_nothing(recipe: Recipe) -> None:
    assert run(recipe, lambda: 1) == 1
    (parent,) = parents()
    with Child(recipe, warm=True) as child:
        assert child._process.is_there(10)
        descendants = parent.children(recursive=True)
        assert descendants
    _, alive = psutil.wait_procs(descendants, timeout=5)
    assert alive == []


def test_a_rank_survives_its_parent(recipe: Recipe) -> None:
    def kill_the_parent() -> str:
        psutil.Process().parent().parent().kill()
        return "still here"

    assert run(recipe, kill_the_parent) == "still here"


def test_a_killed_parent_is_replaced(recipe: Recipe, imports: Path) -> None:
    assert run(recipe, lambda: 1) == 1
    (parent,) = parents()
    parent.kill()
    wait_until(lambda: not parents())
    assert run(recipe, lambda: 2) == 2
    assert len(imports.read_text().split()) == 2


def test_a_parent_that_hangs_costs_time_but_not_the_work(recipe: Recipe, caplog: pytest.LogCaptureFixture) -> None:
    assert run(recipe, lambda: 1) == 1
    (parent,) = parents()
    parent.suspend()
    assert run(recipe, lambda: 2, start_timeout_s=6) == 2
    assert [record.getMessage() for record in caplog.records] == [
        "[rank 0/1 here] the warm pool gave no training process; starting a cold one"
    ]


def test_a_parent_that_dies_of_its_imports_leaves_the_work_to_a_cold_process(recipe: Recipe, imports: Path) -> None:
    broken = imports.parent / "framework.py"
    broken.write_text(broken.read_text() + "import sys\nif 'hvdspark.worker.warm' in sys.orig_argv: os._exit(1)\n")
    assert run(recipe, lambda: 7) == 7
    assert len(imports.read_text().split()) == 2


def test_an_edited_module_is_not_served_from_before(recipe: Recipe, imports: Path) -> None:
    def version() -> Any:
        import framework

        return getattr(framework, "version", 1)

    assert run(recipe, version) == 1
    source = imports.parent / "framework.py"
    source.write_text(source.read_text() + "version = 2\n")
    assert [run(recipe, version), run(recipe, version)] == [2, 2]


def test_a_folder_that_others_can_enter_is_not_used(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / f"hvdspark-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o755)
    assert run(recipe, lambda: 7) == 7
    assert "open to other users" in caplog.text
    assert parents() == []


@pytest.mark.parametrize("busy", ["serving", "importing"])
def test_a_parent_ends_with_its_executor(imports: Path, tmp_path: Path, busy: str) -> None:
    """The executor is what starts the tasks; both are processes of their own here, and it is killed the hard way."""
    if busy == "importing":
        source = imports.parent / "framework.py"
        source.write_text(source.read_text() + "import time\ntime.sleep(600)\n")
    task = tmp_path / "task.py"
    task.write_text(
        textwrap.dedent(f"""
        import tempfile, time
        tempfile.tempdir = {str(tmp_path)!r}
        from hvdspark.launch import pool
        from hvdspark.launch.process import recipe_of

        pool.prewarm(recipe_of({{"IMPORTS": {str(imports)!r}}}, ("framework",)))
        time.sleep(600)
        """)
    )
    executor = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess, sys; subprocess.run([sys.executable, {str(task)!r}])"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    try:
        wait_until(lambda: imports.read_text() != "")
        parent = psutil.Process(int(imports.read_text()))
        (running_task,) = psutil.Process(executor.pid).children()
    finally:
        executor.send_signal(signal.SIGKILL)
        executor.wait()
    running_task.kill()
    _, alive = psutil.wait_procs([parent], timeout=5)
    assert alive == []
    assert sockets(tmp_path) == []
