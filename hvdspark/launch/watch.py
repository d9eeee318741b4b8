"""The driver's watch over a running stage: it gives up tasks that do not answer after others have failed.

Spark hands over what tasks answer when all of them have. A host that is cut off never does, and Spark takes two minutes
to find out. But tasks report a failure through an accumulator as well, and that arrives as soon as the task ends. The
others hear the alarm and end within seconds; those that still have not are waited for no longer: the job is cancelled,
and their executors are replaced, so that another attempt does not go there again.

It also sees to it that a job which Spark does not begin with ends: for ten minutes Spark itself would try in silence.
"""

from __future__ import annotations

import contextlib
import json
import logging
import textwrap
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeVar

from py4j.protocol import Py4JError

from hvdspark.errors import LaunchTimeoutError
from hvdspark.launch.failures import Failure
from hvdspark.launch.slots import count_slots
from hvdspark.plan import RankContext

if TYPE_CHECKING:
    from pyspark import Accumulator, SparkContext
    from pyspark.sql import SparkSession

logger = logging.getLogger(__name__)

# Tasks that can hear the alarm end within seconds of each other; an alarm that has to notice a cut takes up to eleven.
SILENCE_S = 15.0
_POLL_S = 0.1
_IDLE_POLL_S, _WORTH_A_WORD_S = 1.0, 5.0

_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Report:
    """What a task tells the driver when its rank has failed.

    Parameters
    ----------
    nonce
        The job's.
    stage
        Spark's number of the stage.
    partition
        The task's.
    failure
        What happened.
    ranks, hosts
        The rank and the host of every task, by partition.
    """

    nonce: str
    stage: int
    partition: int
    failure: Failure
    ranks: Sequence[int]
    hosts: Sequence[str]

    def to_text(self) -> str:
        """Return it as JSON."""
        return json.dumps({**vars(self), "failure": self.failure.to_json()})

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Read what :meth:`to_text` wrote."""
        fields = json.loads(text)
        return cls(**{**fields, "failure": Failure.from_json(fields["failure"])})


def report(nonce: str, stage: int, partition: int, ranks: Mapping[int, RankContext], failure: Failure) -> str:
    """Make the text of a :class:`Report`; ``ranks`` are the places of all by partition, the rest are its fields."""
    contexts = [ranks[number] for number in range(len(ranks))]
    numbers, hosts = [context.rank for context in contexts], [context.host for context in contexts]
    return Report(nonce, stage, partition, failure, numbers, hosts).to_text()


class _Texts:
    """How Spark adds up the texts of an accumulator."""

    def zero(self, _: list[str]) -> list[str]:
        return []

    def addInPlace(self, mine: list[str], others: list[str]) -> list[str]:  # noqa: N802 - Spark's name
        mine.extend(others)
        return mine


# Spark's driver keeps an accumulator for ever, so there is one for all jobs.
_reports: weakref.WeakKeyDictionary[SparkContext, Accumulator[list[str]]] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def reports_of(context: SparkContext) -> Accumulator[list[str]]:
    """Return what tasks add the texts of their reports to."""
    with _lock:
        if context not in _reports:
            texts: list[str] = []
            _reports[context] = context.accumulator(texts, _Texts())  # type: ignore[arg-type]  # as good as one
        return _reports[context]


class Watch:
    """Watches over one job.

    Parameters
    ----------
    session
        Spark's session.
    nonce
        The job's name, as its tasks report with it.
    start_timeout_s
        Seconds that the job may wait while Spark runs no task at all: then nothing that it could wait for goes on.
    silence_s
        Seconds after the first failure until tasks that have not answered are given up.
    """

    def __init__(self, session: SparkSession, nonce: str, start_timeout_s: float, silence_s: float = SILENCE_S) -> None:
        self._session = session
        self._context = session.sparkContext
        self._nonce = nonce
        # Spark shows it to people, the nonce it does not.
        self._tag = f"hvdspark-{uuid.uuid4().hex}"
        self._start_timeout_s = start_timeout_s
        self._silence_s = silence_s
        self._texts = reports_of(self._context)
        self._failed_at: float | None = None
        self._created = self._idle_since = self._looked_at = time.monotonic()
        self._has_begun = self._is_waiting = False
        self.given_up: list[Failure] = []

    def run(self, job: Callable[[], _Answer]) -> _Answer:
        """Run a job of Spark's, which is cancelled when it is given up.

        Raises
        ------
        LaunchTimeoutError
            When Spark did not begin with it.
        """
        from pyspark import InheritableThread

        ended, answers, errors = threading.Event(), list[_Answer](), list[Exception]()

        def work() -> None:
            try:
                answers.append(job())
            except Exception as exc:  # noqa: BLE001 - for the thread that waits
                errors.append(exc)
            finally:
                ended.set()

        self._context.addJobTag(self._tag)
        # In a thread of its own, because Spark does not always let go of a job that it has not begun with.
        thread = InheritableThread(target=work, name="hvdspark job", daemon=True, session=self._session)
        try:
            thread.start()
            while not ended.wait(_POLL_S):
                self._look()
            if errors:
                raise errors[0]
            return answers[0]
        finally:
            self._context.removeJobTag(self._tag)
            for text in self._own_texts:
                self._texts.value.remove(text)

    @property
    def reports(self) -> list[Report]:
        """What tasks have reported so far."""
        return [Report.from_text(text) for text in self._own_texts]

    @property
    def _own_texts(self) -> list[str]:
        return [text for text in tuple(self._texts.value) if Report.from_text(text).nonce == self._nonce]

    def _look(self) -> None:
        """See whether there is anything left to wait for."""
        now = time.monotonic()
        if self._failed_at is None and self.reports:
            self._failed_at = now
        if self._failed_at is not None and now - self._failed_at > self._silence_s and not self.given_up:
            self._give_up(self.reports)
        if now - self._looked_at < _IDLE_POLL_S:
            return
        self._looked_at = now
        running = _running_tasks(self._context)
        self._look_whether_begun(running, now)
        if self._failed_at is not None or running:
            self._idle_since = now
        elif now - self._idle_since > self._start_timeout_s:
            self._cancel()
            raise LaunchTimeoutError(
                f"Spark began with none of the job's tasks within {self._start_timeout_s:g} s, though it runs no other;"
                f" it can run {count_slots(self._session)} tasks at once. An executor may be gone or excluded since the"
                " slots were counted; Spark's own log tells more."
            )
        elif now - self._idle_since > _WORTH_A_WORD_S and not self._is_waiting:
            self._is_waiting = True
            logger.info("waiting for Spark to begin with the ranks' tasks")

    def _look_whether_begun(self, running: Mapping[int, tuple[str, int]], now: float) -> None:
        """Say once for which jobs this one waits, where it has done so for some time."""
        if self._has_begun or self._is_waiting:
            return
        own = _stages(self._context, self._tag)
        self._has_begun = not own.isdisjoint(running)
        if self._has_begun or not running or now - self._created < _WORTH_A_WORD_S:
            return
        self._is_waiting = True
        others = ", ".join(f"{count} task{'s' * (count > 1)} of '{name}'" for name, count in running.values())
        logger.info("waiting for slots before Spark can begin with the ranks' tasks; it runs now: %s", others)

    def _cancel(self) -> None:
        _quietly(lambda: self._context.cancelJobsWithTag(self._tag))

    def _give_up(self, reports: Sequence[Report]) -> None:
        """Cancel the job, and say which ranks never answered."""
        first, answered = reports[0], {report.partition for report in reports}
        try:
            running = _executors(self._context, first.stage)
        except Py4JError:  # Spark no longer knows the stage
            running = {}
        silent = [partition for partition in running if partition not in answered]
        self.given_up = [report.failure for report in reports]
        for partition in silent:
            place = first.ranks[partition], first.hosts[partition]
            text = (
                f"there was no answer for {self._silence_s:g} s after other ranks had failed; its host may be down, cut"
                " off from the network, or hang"
            )
            self.given_up.append(Failure(*place, "died", text, time=time.time()))
        self._cancel()
        for executor in {running[partition] for partition in silent}:
            logger.warning("executor %s does not answer; asking for another in its place", executor)
            # Until Spark notices by itself, it would send it tasks.
            _quietly(partial(_scala(self._context).killAndReplaceExecutor, executor))


def _executors(context: SparkContext, stage: int) -> dict[int, str]:
    """Return the executors of the tasks that Spark takes for running, by partition."""
    store = _scala(context).statusStore()
    tasks = store.taskList(stage, store.lastStageAttempt(stage).attemptId(), 1 << 20)
    found = [tasks.apply(number) for number in range(tasks.length())]
    return {task.partitionId(): task.executorId() for task in found if task.status() == "RUNNING"}


def _running_tasks(context: SparkContext) -> dict[int, tuple[str, int]]:
    """Return by stage what Spark's pages call it and how many of its tasks run now, of all jobs; none without any."""
    found = _scala(context).statusStore().activeStages()
    stages = [found.apply(number) for number in range(found.length())]
    return {stage.stageId(): (_name(stage), stage.numActiveTasks()) for stage in stages if stage.numActiveTasks()}


def _name(stage: Any) -> str:
    described = stage.description()
    text = described.get() if described.isDefined() else stage.name()
    return textwrap.shorten(text, 80, placeholder=" …")


def _stages(context: SparkContext, tag: str) -> set[int]:
    """Return the numbers of the stages of the jobs with a tag."""
    tracker = _scala(context).statusTracker()
    infos = [tracker.getJobInfo(job) for job in tracker.getJobIdsForTag(tag)]
    return {stage for info in infos if info.isDefined() for stage in info.get().stageIds()}


def _scala(context: SparkContext) -> Any:
    return context._jsc.sc()


def _quietly(act: Callable[[], object]) -> None:
    """Do what can only help."""
    with contextlib.suppress(Py4JError):
        act()
