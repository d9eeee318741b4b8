"""The driver's watch over a running stage: it gives up tasks that do not answer after others have failed.

Spark hands over what tasks answer when all of them have. A host that is cut off never does, and Spark takes two minutes
to find out. But tasks report a failure through an accumulator as well, and that arrives as soon as the task ends. The
others hear the alarm and end within seconds; those that still have not are waited for no longer: the job is cancelled,
and their executors are replaced, so that another attempt does not go there again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import time
import uuid
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from py4j.protocol import Py4JError

from hvdspark.launch.failures import Failure
from hvdspark.plan import RankContext

if TYPE_CHECKING:
    from pyspark import Accumulator, SparkContext

logger = logging.getLogger(__name__)

# Tasks that can hear the alarm end within seconds of each other; an alarm that has to notice a cut takes up to eleven.
SILENCE_S = 15.0
_POLL_S = 0.25


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
    """Watches over one job while it runs; a context manager.

    Parameters
    ----------
    context
        Spark's.
    nonce
        The job's name, as its tasks report with it.
    silence_s
        Seconds after the first failure until tasks that have not answered are given up.
    """

    def __init__(self, context: SparkContext, nonce: str, silence_s: float = SILENCE_S) -> None:
        self._context = context
        self._nonce = nonce
        # Spark shows it to people, the nonce it does not.
        self._tag = f"hvdspark-{uuid.uuid4().hex}"
        self._silence_s = silence_s
        self._texts = reports_of(context)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hvdspark-watch", daemon=True)
        self.given_up: list[Failure] = []

    @property
    def reports(self) -> list[Report]:
        """What tasks have reported so far."""
        return [Report.from_text(text) for text in self._own_texts]

    @property
    def _own_texts(self) -> list[str]:
        return [text for text in tuple(self._texts.value) if Report.from_text(text).nonce == self._nonce]

    def __enter__(self) -> Self:
        self._context.addJobTag(self._tag)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._context.removeJobTag(self._tag)
        for text in self._own_texts:
            self._texts.value.remove(text)

    def _watch(self) -> None:
        since: float | None = None
        while not self._ended.wait(_POLL_S):
            if since is None and self.reports:
                since = time.monotonic()
            if since is not None and time.monotonic() - since > self._silence_s:
                self._give_up(self.reports)
                return

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
        _quietly(lambda: self._context.cancelJobsWithTag(self._tag))
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


def _scala(context: SparkContext) -> Any:
    return context._jsc.sc()


def _quietly(act: Callable[[], object]) -> None:
    """Do what can only help."""
    with contextlib.suppress(Py4JError):
        act()
