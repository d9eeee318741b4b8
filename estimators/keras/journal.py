"""What a rank tells of a training while it runs: the times of its epochs, over all ranks, and how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from hvdspark.estimators.keras.allreduce import Allreduce
from hvdspark.estimators.keras.clock import StepClock
from hvdspark.estimators.keras.metrics import current_metrics

from hvdspark.history import EpochRecord, Progress, RankTimes
from hvdspark.plan import FitPlan
from hvdspark.worker.reporter import PERIOD_S
from hvdspark.worker.session import Session

# Rows of all ranks by step, from one step to before another, counted from the first pass on.
RowsOf = Callable[[int, int], "np.ndarray[Any, Any]"]


class EpochHistory(keras.callbacks.History):  # type: ignore[misc]
    """Keras' history, and the records of the epochs beside it.

    Both are what checkpoints keep of a callback, so that a training that goes on has those of all its epochs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.records: list[dict[str, Any]] = []
        self.last: dict[str, float] = {}
        """The metrics of the last epoch, with what other callbacks have added."""

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Note the metrics."""
        super().on_epoch_end(epoch, logs)
        self.last = {name: float(value) for name, value in (logs or {}).items() if np.ndim(value) == 0}


@dataclass(frozen=True)
class _Stretch:
    """Steps of an epoch in one go: its rows up to each of them, and when it began."""

    epoch: int
    first: int
    rows: np.ndarray[Any, Any]
    began: float
    started: float
    updates: int
    allreduce_s: float


@dataclass(frozen=True)
class _Call:
    """A call of the compiled function: the first of its steps, and how many it has."""

    step: int
    count: int


class Journal:
    """Times the epochs of one rank, and puts them together with those of the others; all ranks call the same.

    Parameters
    ----------
    plan, session, model
        The training.
    allreduce
        What averages the gradients, and knows how long that took.
    clock
        The clock of the steps.
    rows_of
        Tells the rows of steps.
    passes_per_step
        Steps for an update of the weights.
    """

    def __init__(
        self,
        plan: FitPlan,
        session: Session,
        model: Any,
        allreduce: Allreduce,
        clock: StepClock,
        rows_of: RowsOf,
        passes_per_step: int,
    ) -> None:
        self._plan = plan
        self._session = session
        self._model = model
        self._allreduce = allreduce
        self._clock = clock
        self._rows_of = rows_of
        self._passes = passes_per_step
        optimizer = model.optimizer
        self._optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        self._hosts = session.gather_texts(session.context.host, "hvdspark_hosts")
        self._stretch: _Stretch | None = None
        self._call = _Call(0, 0)
        self._shown: dict[str, float] = {}
        self._looked = 0.0
        self._ended: float | None = None
        self._times: list[RankTimes] = []
        self._rows = 0
        self._rate: float | None = None
        self._validation_s: float | None = None

    def begin(self, epoch: int, step: int) -> None:
        """Begin an epoch, or go on within it; both are counted from zero."""
        first = epoch * self._plan.steps_per_epoch
        rows = np.cumsum(self._rows_of(first + step, first + self._plan.steps_per_epoch), dtype=np.int64)
        self._call, self._ended, self._validation_s = _Call(step, 0), None, None
        self._clock.start()
        self._stretch = _Stretch(
            epoch, step, rows, time.perf_counter(), time.time(), self._updates(), self._allreduce.seconds
        )

    def call(self, step: int, count: int) -> None:
        """Say that the compiled function takes so many steps of the epoch now, beginning with one."""
        self._call = _Call(step, count)

    def called(self, step: int) -> None:
        """Say that the epoch has come to a step."""
        self._call = _Call(step, 0)
        # Metrics take a millisecond: not at every call.
        if self._session.is_first and time.perf_counter() - self._looked >= PERIOD_S:
            self._looked = time.perf_counter()
            self._shown = current_metrics(self._model)

    def trained(self, rows: int) -> None:
        """Say that the steps of the epoch are through, in which all ranks had so many rows; all ranks meet here."""
        assert self._stretch is not None, "begin() was not called"
        self._clock.stop(rows)
        self._ended = time.perf_counter()
        self._rows = rows
        self._rate = _rate_of(self._optimizer)
        own = (*self._clock.last, self._allreduce.seconds - self._stretch.allreduce_s)
        self._times = self._gather(own)

    @contextmanager
    def validating(self) -> Iterator[None]:
        """Time the validation, which is the block."""
        began = time.perf_counter()
        yield
        self._validation_s = time.perf_counter() - began

    def record(self, metrics: Mapping[str, float]) -> EpochRecord:
        """Return the record of the epoch that has ended."""
        assert self._stretch is not None, "begin() was not called"
        self._shown = dict(metrics)
        seconds = self._times[0].seconds
        return EpochRecord(
            epoch=self._stretch.epoch + 1,
            started=self._stretch.started,
            seconds=seconds,
            rows=self._rows,
            rows_per_s=self._rows / max(seconds, 1e-9),
            learning_rate=self._rate,
            metrics=dict(metrics),
            validation_s=self._validation_s,
            ranks=tuple(self._times),
        )

    def progress(self) -> Progress | None:
        """Return how far this rank is; may be called by another thread than the one that trains."""
        stretch, call, shown, ended = self._stretch, self._call, self._shown, self._ended
        if stretch is None:
            return None
        step = call.step
        if call.count:
            # Within a call only the optimizer's own count goes on.
            taken = stretch.first + (self._updates() - stretch.updates) * self._passes
            step = min(max(taken, call.step), call.step + call.count)
        rows = int(stretch.rows[step - stretch.first - 1]) if step > stretch.first else 0
        return Progress(
            epoch=stretch.epoch + 1,
            epochs=self._plan.epochs,
            step=step,
            steps=self._plan.steps_per_epoch,
            rows_per_s=rows / max((ended or time.perf_counter()) - stretch.began, 1e-9),
            loss=shown.get("loss"),
            metrics={name: value for name, value in shown.items() if name != "loss"},
            time=time.time(),
        )

    def _updates(self) -> int:
        return int(self._optimizer.iterations.numpy())

    def _gather(self, own: tuple[float, float, float]) -> list[RankTimes]:
        """Put the times of this rank together with those of all."""
        context = self._session.context
        table = np.zeros((context.size, len(own)))
        table[context.rank] = own
        found = self._session.sum(table.reshape(-1), "hvdspark_times").reshape(table.shape).tolist()
        return [
            RankTimes(rank, host, seconds, waited_s, allreduce_s, max(0.0, seconds - waited_s - allreduce_s))
            for rank, (host, (seconds, waited_s, allreduce_s)) in enumerate(zip(self._hosts, found, strict=True))
        ]


def _rate_of(optimizer: Any) -> float | None:
    """Return the learning rate of the last step, where the optimizer has one."""
    rate = getattr(optimizer, "learning_rate", None)
    return None if rate is None else float(np.asarray(rate))
