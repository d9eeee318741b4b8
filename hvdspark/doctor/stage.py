"""Runs the probe on the executors, in bounded time, and in another way where Spark cannot run Python there."""

from __future__ import annotations

import base64
import inspect
import json
import re
import shlex
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from hvdspark.doctor import probe
from hvdspark.errors import LaunchTimeoutError, telling_line

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

_Answer = TypeVar("_Answer")

_CANCEL_S, _POLL_S = 10.0, 0.1


@dataclass(frozen=True)
class Probed:
    """What the executors answered.

    Parameters
    ----------
    answers
        One for every executor, see :mod:`hvdspark.doctor.probe`.
    tasks
        How many tasks each of them had, and the GPUs of these, in the same order.
    hindrance
        Why Spark's own Python tasks do not run there; then the answers came without them.
    silent
        What came from executors on which the probe itself did not run.
    """

    answers: Sequence[Mapping[str, Any]]
    tasks: Sequence[Sequence[Sequence[str]]]
    hindrance: str | None = None
    silent: Sequence[Mapping[str, str]] = ()


def bounded(spark: SparkSession, job: Callable[[], _Answer], what: str, timeout_s: float) -> _Answer:
    """Run jobs of Spark's, which are cancelled when they take too long.

    Raises
    ------
    LaunchTimeoutError
        When they do.
    """
    from pyspark import InheritableThread

    ended, answers, errors = threading.Event(), list[_Answer](), list[Exception]()
    tag = f"hvdspark-doctor-{uuid.uuid4().hex}"

    def work() -> None:
        try:
            answers.append(job())
        except Exception as exc:  # noqa: BLE001 - for the thread that waits
            errors.append(exc)
        finally:
            ended.set()

    context = spark.sparkContext
    context.addJobTag(tag)
    try:
        InheritableThread(target=work, name="hvdspark doctor", daemon=True, session=spark).start()
    finally:
        context.removeJobTag(tag)
    if not ended.wait(timeout_s):
        context.cancelJobsWithTag(tag)
        ended.wait(_CANCEL_S)
        raise LaunchTimeoutError(
            f"{what} did not end within {timeout_s:g} s. Other jobs may hold the cluster's slots, or an executor hangs:"
            " see Spark's own pages of the job and the executors' logs."
        )
    if errors:
        raise errors[0]
    return answers[0]


def probe_executors(spark: SparkSession, tasks: int, settings: Mapping[str, Any], timeout_s: float) -> Probed:
    """Examine all executors.

    Parameters
    ----------
    spark
        The session.
    tasks
        As many as the cluster can run at once, so that all executors get some.
    settings
        For the probe, see :func:`hvdspark.doctor.probe.examine_in_barrier`.
    timeout_s
        Seconds that a job may take.

    Raises
    ------
    LaunchTimeoutError
        When it took longer.
    """
    context = spark.sparkContext

    def in_barrier(what: str) -> list[dict[str, Any]]:
        task = _task(inspect.getsource(probe), what, dict(settings))
        return context.parallelize(range(tasks), tasks).barrier().mapPartitions(task).collect()

    def job() -> list[dict[str, Any]]:
        answers = in_barrier("examine_in_barrier")
        # Once more, and quickly now that Spark's Python is up: the less time it takes, the more it says of clocks.
        began = time.time()
        times, ended = in_barrier("tell_time"), time.time()
        ahead = {one["place"]: _ahead_s(one["time"], began, ended) for one in times}
        return [{**answer, "ahead_s": ahead[answer["place"]]} for answer in answers]

    try:
        answers = bounded(spark, job, "the barrier stage that examines the executors", timeout_s)
    except LaunchTimeoutError:
        raise
    except Exception as exc:  # noqa: BLE001 - Spark's own errors are of many kinds
        return _probe_by_shell(spark, tasks, settings, timeout_s, telling_line(exc))
    firsts = [answer for answer in answers if "facts" in answer]
    gpus = [[one["gpus"] for one in answers if one["place"] == first["place"]] for first in firsts]
    return Probed(firsts, gpus)


def _ahead_s(told: Sequence[float], began: float, ended: float) -> list[float]:
    """Return by how much a clock is ahead, at least and at most.

    Parameters
    ----------
    told
        When the work there began and ended, by that clock.
    began, ended
        When the driver asked and had the answer, by its own.
    """
    return [told[1] - ended, told[0] - began]


def _task(source: str, what: str, settings: Mapping[str, Any]) -> Callable[[Iterable[int]], Iterator[dict[str, Any]]]:
    def task(_: Iterable[int]) -> Iterator[dict[str, Any]]:
        from pyspark import BarrierTaskContext

        # The executor may have no hvdspark, or another one: nothing of this module is imported there.
        scope: dict[str, Any] = {"__name__": "hvdspark_doctor_probe"}
        exec(source, scope)
        return iter([scope[what](BarrierTaskContext.get(), settings)])

    return task


def _probe_by_shell(
    spark: SparkSession, tasks: int, settings: Mapping[str, Any], timeout_s: float, hindrance: str
) -> Probed:
    """Run the probe beside Spark's Python: Java starts it, as a program of its own, so that any Python will do."""
    context: Any = spark.sparkContext
    # Through standard input, because everybody can read command lines, and the Store's options may hold secrets.
    program = f"{inspect.getsource(probe)}\n\nmain({dict(settings)!r})\n"
    line = base64.b64encode(program.encode()).decode()
    run = "import base64, sys; exec(base64.b64decode(sys.stdin.readline()).decode())"
    # What the shell says must be known even where there is no such Python; its parent is the executor.
    script = (
        f"read -r program; printf '%s\\n' \"$program\" | {shlex.quote(context.pythonExec)} -c {shlex.quote(run)} 2>&1;"
        " printf '\\n%s%s ' shell: $?; tr '\\0' ' ' </proc/$PPID/cmdline; echo"
    )
    lines, command = context._jvm.java.util.ArrayList(), context._jvm.java.util.ArrayList()
    for _ in range(tasks):
        lines.add(line)
    for word in ("/bin/sh", "-c", script):
        command.add(word)

    def job() -> list[list[str]]:
        parts = context._jsc.parallelize(lines, tasks).pipe(command).glom().collect()
        return [list(part) for part in parts]

    _await_free_slots(spark)
    began = time.time()
    try:
        texts = bounded(spark, job, "the job that examines the executors", timeout_s)
    except LaunchTimeoutError:
        raise
    except Exception as exc:  # noqa: BLE001 - see above
        return Probed((), (), f"{hindrance}; and without Python: {telling_line(exc)}")
    found, ended = _sorted_out(texts, hindrance), time.time()
    return replace(found, answers=[{**one, "ahead_s": _ahead_s(one["time"], began, ended)} for one in found.answers])


def _await_free_slots(spark: SparkSession) -> None:
    """Wait for the tasks of a stage that has failed to end: where they run, no other would be sent."""
    tracker: Any = spark.sparkContext._jsc.sc().statusTracker()
    deadline = time.monotonic() + _CANCEL_S
    while any(executor.numRunningTasks() for executor in tracker.getExecutorInfos()):
        if time.monotonic() > deadline:
            return
        time.sleep(_POLL_S)


def _sorted_out(texts: Sequence[Sequence[str]], hindrance: str) -> Probed:
    """Keep one answer of every executor."""
    answers: dict[str, Mapping[str, Any]] = {}
    silent: dict[str, Mapping[str, str]] = {}
    tasks: dict[str, list[list[str]]] = {}
    for lines in texts:
        started = next((line for line in lines if line.startswith("shell:")), "shell: ")
        executor = _word_after("--executor-id", started) or "driver"
        tasks.setdefault(executor, []).append([])
        marked = [line for line in lines if line.startswith(probe.MARK)]
        if marked:
            answers[executor] = json.loads(marked[-1][len(probe.MARK) :])
        else:
            said = [line for line in lines if line.strip() and not line.startswith("shell:")]
            host = _word_after("--hostname", started) or ""
            silent[executor] = {"executor": executor, "host": host, "error": said[-1] if said else "no answer"}
    left = {executor: text for executor, text in silent.items() if executor not in answers}
    return Probed(list(answers.values()), [tasks[executor] for executor in answers], hindrance, list(left.values()))


def _word_after(option: str, line: str) -> str:
    found = re.search(rf"{option} (\S+)", line)
    return found[1] if found else ""
