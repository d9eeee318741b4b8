"""The training process: its answer, its death and its output, with real processes, cold and from the warm pool."""

from __future__ import annotations

import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import pytest
from unkillable import held

import hvdspark
from hvdspark.errors import LaunchError, RendezvousError
from hvdspark.launch import pool, process
from hvdspark.launch.child import Child, Patience
from hvdspark.launch.failures import Failure, Outcome, error_of
from hvdspark.launch.guard import STACKS
from hvdspark.launch.mpi import ProcessManager, mpi_environment
from hvdspark.launch.openmpi import OPEN_MPI, place_environment
from hvdspark.launch.process import recipe_of
from hvdspark.launch.topology import rank_environment
from hvdspark.plan import RankContext
from hvdspark.worker.job import Job

CONTEXT = RankContext(rank=1, size=2, local_rank=1, local_size=2, cross_rank=0, cross_size=1, host="here")


@pytest.fixture(autouse=True, scope="module")
def _pool_ends_with_these_tests() -> Iterator[None]:
    yield
    for parent in pool._started:
        parent.kill()
        parent.wait()
    pool._started.clear()


@pytest.fixture(autouse=True, params=["cold", "warm"])
def start(request: pytest.FixtureRequest) -> str:
    """How the process is started: all that is true of one is true of the other."""
    return str(request.param)


@pytest.fixture
def run(start: str, tmp_path: Path) -> Callable[..., Outcome]:
    def call(
        function: Any,
        *args: Any,
        log: io.BytesIO | None = None,
        start_timeout_s: float = 60,
        stall_timeout_s: float | None = None,
    ) -> Outcome:
        payload = cloudpickle.dumps(Job(function, args))
        environment = {"PLACE": "told", STACKS: str(tmp_path / "stacks")}
        with Child(recipe_of({"MARK": "set"}, ("json",)), warm=start == "warm") as child:
            return child.run(payload, CONTEXT, environment, log, Patience(start_timeout_s, stall_timeout_s))

    return call


def test_the_result_comes_back_with_its_environment(run: Callable[..., Outcome]) -> None:
    outcome = run(lambda x: (x, os.environ["MARK"], os.environ["PLACE"]), 7)
    assert outcome.result is not None
    assert cloudpickle.loads(outcome.result) == (7, "set", "told")


def test_a_large_payload_and_a_large_result_pass(run: Callable[..., Outcome]) -> None:
    outcome = run(lambda data: data[::-1], b"ab" * 5_000_000)
    assert outcome.result is not None
    assert cloudpickle.loads(outcome.result) == b"ba" * 5_000_000


def test_a_user_error_comes_back_with_type_message_traceback_and_last_lines(run: Callable[..., Outcome]) -> None:
    def broken() -> None:
        print("WARNING: All log messages before absl::InitializeLog() is called are written to STDERR")
        print("before the error")
        raise LookupError("no such thing\nand more")

    failure = run(broken).failure
    assert failure is not None
    assert (failure.rank, failure.host, failure.kind) == (1, "here", "user")
    assert failure.error == "LookupError: no such thing"
    assert "in broken" in failure.details
    assert "hvdspark/worker" not in failure.details
    assert failure.log_tail == "before the error"


def test_an_error_whose_message_is_no_text_comes_back_all_the_same(run: Callable[..., Outcome]) -> None:
    class SpeechlessError(Exception):
        def __str__(self) -> str:
            raise TypeError("not everything is text")

    def broken(error: Exception) -> None:
        raise error

    said = {
        "FileNotFoundError: no caf\\udce9.csv": FileNotFoundError("no caf\udce9.csv"),
        "ValueError: 'a\\x00b' is no name": ValueError("'a\0b' is no name"),
        "SpeechlessError: <exception str() failed>": SpeechlessError(),
    }
    for line, error in said.items():
        failure = run(broken, error).failure
        assert failure is not None
        assert (failure.kind, failure.error) == ("user", line)
        assert "in broken" in failure.details


def test_a_module_that_cannot_be_imported_ahead_is_named(start: str) -> None:
    with Child(recipe_of({}, ("json", "no_such_framework")), warm=start == "warm") as child:
        failure = child.run(cloudpickle.dumps(Job(len, ("",))), CONTEXT, {}, None, Patience(60)).failure
    assert failure is not None
    assert (failure.kind, failure.error) == ("start", "ModuleNotFoundError: No module named 'no_such_framework'")
    error = error_of([failure])
    assert isinstance(error, LaunchError)
    assert str(error).startswith("rank 1 on here: ModuleNotFoundError: No module named 'no_such_framework'\n")


def test_an_mpi_that_does_not_come_up_is_told_by_its_own_words(start: str) -> None:
    with (
        ProcessManager("127.0.0.1", ["127.0.0.1"], [0, 0], "token") as manager,
        Child(recipe_of({"MPI4PY_LIBMPI": "/no/such/libmpi.so"}, ("json",)), warm=start == "warm") as child,
    ):
        environment = mpi_environment(manager.address, "token") | rank_environment(CONTEXT)
        failure = child.run(cloudpickle.dumps(Job(len, ("",))), CONTEXT, environment, None, Patience(60)).failure
    assert failure is not None
    assert (failure.kind, failure.error) == ("meet", "RuntimeError: cannot load MPI library")
    assert "/no/such/libmpi.so" in failure.details
    assert isinstance(error_of([failure]), RendezvousError)


def test_a_rank_whose_host_server_ends_while_it_joins_may_try_again(start: str) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as manager,
        Child(recipe_of({}, ("json",)), warm=start == "warm") as child,
    ):
        threading.Thread(target=lambda: manager.accept()[0].close(), daemon=True).start()
        environment = mpi_environment(manager.getsockname(), "token") | place_environment(OPEN_MPI, 0)
        environment |= rank_environment(CONTEXT)
        failure = child.run(cloudpickle.dumps(Job(len, ("",))), CONTEXT, environment, None, Patience(60)).failure
    assert failure is not None
    assert failure.kind == "unmet", failure


def test_a_lost_peer_is_told_from_an_error_of_the_users_own(run: Callable[..., Outcome]) -> None:
    class HorovodInternalError(RuntimeError):
        pass

    def broken() -> None:
        raise HorovodInternalError("Connection closed by peer")

    failure = run(broken).failure
    assert failure is not None
    assert failure.kind == "peer"


def test_a_killed_process_is_named_by_its_signal(run: Callable[..., Outcome]) -> None:
    failure = run(lambda: os.kill(os.getpid(), signal.SIGKILL)).failure
    assert failure is not None
    assert failure.kind == "died"
    assert "SIGKILL" in failure.error


@pytest.mark.parametrize(
    ("end", "kind", "said"),
    [
        ((signal.raise_signal, (signal.SIGKILL,)), "killed", "was killed by SIGKILL before it began with its work"),
        ((os._exit, (3,)), "start", "ended with exit code 3 before it gave a result"),
    ],
)
def test_a_process_that_is_killed_before_its_work_is_told_from_one_that_ends_by_itself(
    run: Callable[..., Outcome], end: Any, kind: str, said: str
) -> None:
    class Ending:
        """What ends the process that reads it."""

        def __reduce__(self) -> Any:
            return end

    failure = run(lambda _: None, Ending()).failure
    assert failure is not None
    assert failure.kind == kind
    assert said in failure.error


def test_the_memory_that_a_killed_process_held_is_told(run: Callable[..., Outcome]) -> None:
    def fill() -> None:
        held = bytearray(300 << 20)
        held[::4096] = b"x" * len(held[::4096])
        os.kill(os.getpid(), signal.SIGKILL)

    failure = run(fill).failure
    assert failure is not None
    found = re.search(r"was killed by SIGKILL; it held (\d+) MiB of memory at most$", failure.error)
    assert found is not None, failure.error
    assert 300 <= int(found[1]) < 450


TASK = """
import os, sys, time
from pathlib import Path

Path(sys.argv[1], "cgroup.procs").write_text(str(os.getpid()))
import cloudpickle, psutil
from hvdspark.launch import pool
from hvdspark.launch.child import Child, Patience
from hvdspark.launch.process import recipe_of
from hvdspark.plan import RankContext
from hvdspark.worker.job import Job

def fill():
    Path("/proc/self/oom_score_adj").write_text("1000")  # nobody else is to be killed
    held = [b"x" * (10 << 20) for _ in range(50)]

with Child(recipe_of({}, ("json",)), warm=sys.argv[2] == "warm") as child:
    payload, context = cloudpickle.dumps(Job(fill)), RankContext(0, 1, 0, 1, 0, 1, "here")
    print(child.run(payload, context, {}, None, Patience(60)).failure.to_json())
# The group can be removed when nothing is left of any process that was in it.
for parent in pool._started:
    while psutil.Process(parent.pid).children():
        time.sleep(0.01)
    parent.kill()
    parent.wait()
"""


def test_a_process_that_the_system_killed_because_memory_ran_out_is_told_from_others(
    start: str, memory_limit: Path
) -> None:
    task = subprocess.run([sys.executable, "-c", TASK, memory_limit, start], capture_output=True, text=True)
    assert task.returncode == 0, task.stderr
    failure = Failure.from_json(task.stdout)
    assert failure.kind == "died"
    found = re.search(r"killed by SIGKILL, because memory ran out; it held (\d+) MiB of memory at most", failure.error)
    assert found is not None, failure.error
    # The others of the group hold some of what it may have.
    assert 100 <= int(found[1]) <= 320
    assert "spark.executor.memoryOverhead" in failure.error


def test_memory_that_ran_out_elsewhere_on_the_host_killed_no_process_of_ours(
    run: Callable[..., Outcome], memory_limit: Path
) -> None:
    def be_killed() -> None:
        other = os.fork()
        if other == 0:
            Path(memory_limit, "cgroup.procs").write_text(str(os.getpid()))
            held = [b"x" * (10 << 20) for _ in range(50)]
            os._exit(len(held))
        assert os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) == -signal.SIGKILL
        os.kill(os.getpid(), signal.SIGKILL)

    failure = run(be_killed).failure
    assert failure is not None
    assert re.match(r"the training process was killed by SIGKILL(?!, because)", failure.error)


@pytest.fixture
def memory_limit() -> Iterator[Path]:
    """A control group of 200 MB."""
    roots = {
        Path("/sys/fs/cgroup/memory"): "memory.limit_in_bytes",  # the first version
        Path("/sys/fs/cgroup"): "memory.max",
    }
    for root, name in roots.items():
        group = root / f"hvdspark-test-{uuid.uuid4().hex}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            # Not only a folder: what is in it would have no limit.
            if (group / name).exists():
                (group / name).write_text(str(200_000_000))
                yield group
                return
        finally:
            # What was in it ends a moment after its task.
            wait_until(lambda group=group: is_removed(group))
    pytest.skip("control groups for memory cannot be made here; that takes root")


def is_removed(group: Path) -> bool:
    with contextlib.suppress(OSError):
        group.rmdir()
    return not group.exists()


def test_a_process_that_was_stopped_is_given_up_with_what_it_was_doing(run: Callable[..., Outcome]) -> None:
    def stop_here() -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def stop_myself() -> None:
        # Any of these could take the signal that asks for the stacks, while this thread goes on.
        for _ in range(8):
            threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
        stop_here()
        time.sleep(600)

    started = time.monotonic()
    failure = run(stop_myself, stall_timeout_s=5).failure
    assert 4 < time.monotonic() - started < 25
    assert failure is not None
    assert failure.kind == "stalled"
    assert re.match(r"the training process gave no sign of life for \d+ s", failure.error)
    assert "in stop_here" in failure.details
    assert failure.sign is not None
    assert failure.sign.is_silent


def test_a_process_that_was_stopped_together_with_its_guard_is_given_up_and_ended(
    run: Callable[..., Outcome], tmp_path: Path
) -> None:
    def stop_my_group() -> None:
        (tmp_path / "pids").write_text(f"{os.getpid()} {os.getppid()}")
        os.killpg(0, signal.SIGSTOP)
        time.sleep(600)

    failure = run(stop_my_group, stall_timeout_s=3).failure
    assert failure is not None
    assert failure.kind == "stalled"
    assert "in stop_my_group" in failure.details
    assert failure.left == ""
    _, alive = psutil.wait_procs(running(tmp_path / "pids"), timeout=5)
    assert alive == []


@pytest.mark.parametrize("hangs", [True, False], ids=["hanging", "with a result"])
def test_a_process_that_cannot_be_killed_is_named_and_not_waited_for(
    run: Callable[..., Outcome],
    tmp_path: Path,
    hangs: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # These are waited for in full here.
    monkeypatch.setattr("hvdspark.launch.process.END_TIMEOUT_S", 2.0)
    monkeypatch.setattr("hvdspark.launch.child._FINISH_S", 1.0)
    monkeypatch.setattr("hvdspark.launch.child._STACKS_TIMEOUT_S", 0.5)

    def wait_for_the_tracer() -> str:
        (tmp_path / "part").write_text(f"{os.getpid()} {os.getppid()}")
        (tmp_path / "part").rename(tmp_path / "pids")
        # However long the tracer takes, it is no stall.
        while not (tmp_path / "traced").exists():
            hvdspark.moved_on("the first batch")
            time.sleep(0.02)
        while hangs:
            time.sleep(0.02)
        return "done"

    outcomes: list[Outcome] = []
    log = io.BytesIO()
    settings = {"stall_timeout_s": 3, "log": log}
    thread = threading.Thread(target=lambda: outcomes.append(run(wait_for_the_tracer, **settings)), daemon=True)
    thread.start()
    wait_until((tmp_path / "pids").exists)
    rank, guard = running(tmp_path / "pids")
    with held(rank.pid):
        (tmp_path / "traced").touch()
        thread.join(60)
        assert not thread.is_alive()
        assert rank.is_running()
    _, alive = psutil.wait_procs([rank, guard], timeout=10)
    assert alive == []
    left = f"process {rank.pid} (state t) cannot be killed"
    assert left in caplog.text
    if not hangs:
        assert outcomes[0].failure is None
        return
    failure = outcomes[0].failure
    assert failure is not None
    assert failure.kind == "stalled"
    assert failure.left == f"{left}; a file system or a device of here may not answer it"
    assert failure.left in log.getvalue().decode()


def test_work_that_no_longer_moves_on_is_given_up_with_the_stacks_of_its_threads(run: Callable[..., Outcome]) -> None:
    def hang() -> None:
        hvdspark.moved_on("batch 17")
        endless_work()

    def endless_work() -> None:
        while True:
            time.sleep(1)

    failure = run(hang, stall_timeout_s=3).failure
    assert failure is not None
    assert failure.kind == "stalled"
    assert re.fullmatch(r"the training did not move on for \d+ s \(batch 17\)", failure.error)
    assert "in endless_work" in failure.details
    assert failure.sign is not None
    assert not failure.sign.is_silent


def test_work_that_moves_on_may_take_longer_than_a_stall(run: Callable[..., Outcome]) -> None:
    def work() -> str:
        for batch in range(14):
            hvdspark.moved_on(f"batch {batch}")
            time.sleep(0.25)
        return "done"

    outcome = run(work, stall_timeout_s=3)
    assert outcome.result is not None, outcome.failure


def test_an_exit_without_an_answer_is_named_by_its_code(run: Callable[..., Outcome]) -> None:
    failure = run(lambda: os._exit(3)).failure
    assert failure is not None
    assert "exit code 3" in failure.error


def test_a_process_that_does_not_begin_in_time_is_ended(run: Callable[..., Outcome]) -> None:
    class Unending:
        """What a process is not through reading when its time is over, however fast it started."""

        def __reduce__(self) -> tuple[Callable[[float], None], tuple[int]]:
            return time.sleep, (600,)

    started = time.monotonic()
    failure = run(lambda _: None, Unending(), start_timeout_s=0.5).failure
    assert failure is not None
    assert failure.kind == "late"
    assert "did not begin within 0.5 s" in failure.error
    assert time.monotonic() - started < 30


def test_output_goes_to_the_log_with_the_rank_before_each_line(run: Callable[..., Outcome]) -> None:
    log = io.BytesIO()
    run(lambda: print("first\nsecond"), log=log)
    assert log.getvalue().decode().splitlines() == ["[rank 1/2 here] first", "[rank 1/2 here] second"]


def test_of_a_line_without_end_an_error_tells_the_beginning_and_the_log_all(run: Callable[..., Outcome]) -> None:
    def broken() -> None:
        print("é" * 1_000_000)
        print("short")
        print("and no end", end="")
        raise LookupError

    log = io.BytesIO()
    failure = run(broken, log=log).failure
    assert failure is not None
    assert failure.log_tail.splitlines() == ["é" * 2000 + " … (998000 more characters)", "short", "and no end"]
    lines = log.getvalue().decode().splitlines()
    assert [len(line) for line in lines[:3]] == [len("[rank 1/2 here] ") + size for size in (1_000_000, 5, 10)]
    assert lines[3] == "[rank 1/2 here] LookupError"


def test_a_log_that_is_slower_than_the_process_gets_all_that_it_printed(run: Callable[..., Outcome]) -> None:
    class Slow(io.BytesIO):
        def flush(self) -> None:
            time.sleep(0.05)

    def broken() -> None:
        for number in range(30):
            print(number)
        raise LookupError

    log = Slow()
    failure = run(broken, log=log).failure
    assert failure is not None
    assert failure.log_tail.splitlines() == [str(number) for number in range(30)]
    assert log.getvalue().decode().splitlines()[:30] == [f"[rank 1/2 here] {number}" for number in range(30)]


def test_what_outlives_a_guard_that_was_killed_is_not_waited_for(
    run: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "END_TIMEOUT_S", 1.0)
    place = tmp_path / "orphan"

    def leave_an_orphan() -> None:
        orphan = subprocess.Popen(["sleep", "120"])
        place.write_text(str(orphan.pid))
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(600)

    try:
        failure = run(leave_an_orphan).failure
        assert psutil.pid_exists(int(place.read_text()))
    finally:
        os.kill(int(place.read_text()), signal.SIGKILL)
    assert failure is not None
    assert failure.kind == "died"
    assert failure.left.startswith("a process that outlived its guard")


def test_of_a_progress_bar_an_error_tells_the_last_state(run: Callable[..., Outcome]) -> None:
    def broken() -> None:
        for step in range(100_000):
            print(f"\rstep {step} of 100000", end="")
        print("\r\na line\r\nwith\rout")
        raise LookupError

    failure = run(broken).failure
    assert failure is not None
    assert failure.log_tail == "step 99999 of 100000\na line\nout"


def test_a_log_that_cannot_be_written_does_not_stop_the_work(
    run: Callable[..., Outcome], caplog: pytest.LogCaptureFixture
) -> None:
    class Full(io.BytesIO):
        def writelines(self, lines: Any) -> None:
            raise OSError(28, "No space left on device")

    assert run(lambda: print("x") or 5, log=Full()).result is not None
    assert "cannot write the log" in caplog.text


def test_what_the_process_started_ends_with_it(run: Callable[..., Outcome]) -> None:
    def leave_a_grandchild() -> int:
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True).pid

    outcome = run(leave_a_grandchild)
    assert outcome.result is not None
    pid = cloudpickle.loads(outcome.result)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_the_process_and_its_folder_go_when_its_task_is_killed(tmp_path: Path, start: str) -> None:
    """The task is a process of its own here, because it is killed the hard way."""
    script = tmp_path / "task.py"
    pids, folder = tmp_path / "pids", tmp_path / "the rank's"
    (folder / "within").mkdir(parents=True)
    script.write_text(
        textwrap.dedent(f"""
        import cloudpickle
        from hvdspark.launch.child import Child, Patience
        from hvdspark.launch.process import recipe_of
        from hvdspark.plan import RankContext
        from hvdspark.worker.job import Job

        def work():
            import os, pathlib, subprocess, sys, time
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
            part = pathlib.Path({str(pids)!r} + ".part")
            part.write_text(f"{{os.getpid()}} {{child.pid}}")
            part.rename({str(pids)!r})
            time.sleep(600)

        context = RankContext(0, 1, 0, 1, 0, 1, "here")
        with Child(recipe_of({{}}, ("json",)), warm={start == "warm"}) as child:
            child.run(cloudpickle.dumps(Job(work)), context, {{}}, None, Patience(60), folder={str(folder)!r})
        """)
    )
    task = subprocess.Popen([sys.executable, str(script)])
    try:
        wait_until(pids.exists)
        descendants = [psutil.Process(int(pid)) for pid in pids.read_text().split()]
    finally:
        task.kill()
        task.wait()
    _, alive = psutil.wait_procs(descendants, timeout=5)
    assert alive == []
    wait_until(lambda: not folder.exists())


def running(pids: Path) -> list[psutil.Process]:
    """Return the processes whose numbers are in a file, those that are still there."""
    found = []
    for pid in pids.read_text().split():
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(psutil.Process(int(pid)))
    return found


def wait_until(condition: Any, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)
