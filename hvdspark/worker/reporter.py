"""Brings what a training tells of itself into its run's folder, without ever holding the training up."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

from hvdspark.history import Progress, write_plain_history, write_progress
from hvdspark.store import Store

logger = logging.getLogger(__name__)

PERIOD_S = 1.0
# At the end of a training what is left is waited for, but no longer: a Store that hangs must not keep a model back.
_PARTING_S = 10.0


class Reporter:
    """Writes in a thread of its own. What cannot be written is logged once, and left; a context manager.

    Parameters
    ----------
    store, run_id
        Whose folder.
    progress
        Says how far the training is; called in that thread, about once a second.
    period_s
        Seconds between two calls.
    """

    def __init__(
        self, store: Store, run_id: str, progress: Callable[[], Progress | None], period_s: float = PERIOD_S
    ) -> None:
        self._store = store
        self._run_id = run_id
        self._progress = progress
        self._period_s = period_s
        self._jobs: dict[str, Callable[[], None]] = {}
        self._failing: set[str] = set()
        self._wanted = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="hvdspark reporter", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._wanted:
            self._closing = True
            self._wanted.notify()
        self._thread.join(_PARTING_S)
        if self._thread.is_alive():
            logger.warning("the Store takes too long: the last of history and progress may be missing in it")

    def history(self, epochs: Sequence[Mapping[str, Any]]) -> None:
        """Have the history written: all epochs so far, as :meth:`hvdspark.history.EpochRecord.to_plain` gives them."""
        records = tuple(epochs)
        self.soon("the history", lambda: write_plain_history(self._store, self._run_id, records))

    def soon(self, what: str, job: Callable[[], None]) -> None:
        """Have something done; it takes the place of what was asked for by the same name and has not begun yet."""
        with self._wanted:
            self._jobs[what] = job
            self._wanted.notify()

    def _work(self) -> None:
        due = time.monotonic()
        while not self._closing:
            with self._wanted:
                self._wanted.wait_for(lambda: self._closing or self._jobs, max(0.0, due - time.monotonic()))
            self._do_jobs()
            if time.monotonic() >= due:
                self._try("the progress", self._write_progress)
                due = time.monotonic() + self._period_s
        self._do_jobs()
        self._try("the progress", self._write_progress)

    def _do_jobs(self) -> None:
        with self._wanted:
            jobs, self._jobs = self._jobs, {}
        for what, job in jobs.items():
            self._try(what, job)

    def _write_progress(self) -> None:
        progress = self._progress()
        if progress is not None:
            write_progress(self._store, self._run_id, progress)

    def _try(self, what: str, job: Callable[[], None]) -> None:
        try:
            job()
        except Exception as exc:  # noqa: BLE001 - what is trained is worth more than any word about it
            if what not in self._failing:
                logger.warning("cannot write %s: %s; the training goes on", what, exc)
            self._failing.add(what)
        else:
            self._failing.discard(what)
