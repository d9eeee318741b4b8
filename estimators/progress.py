"""What a driver shows of a fit while it runs: a bar in a terminal or notebook, else a line in the log per epoch."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hvdspark.estimators.watching import watched

from hvdspark.errors import StoreError
from hvdspark.history import EpochRecord, Progress, read_history, read_progress
from hvdspark.store import Store

logger = logging.getLogger(__name__)

_POLL_S = 0.5

_BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"


@contextmanager
def shown(store: Store, run_id: str, epochs: int, verbose: int) -> Iterator[None]:
    """Show the training of a run for the time of a block, which it never holds up.

    Parameters
    ----------
    store, run_id
        Which run. What an earlier fit left in its folder is not shown.
    epochs
        How many there will be at most.
    verbose
        0 shows nothing; 1 a bar, or where there is neither terminal nor notebook a line per epoch; 2 always lines.
    """
    if verbose == 0:
        yield
        return
    display = Bar(store, run_id) if verbose == 1 and has_bar() else Lines(store, run_id, epochs)
    with watched(display, "the display of the progress", _POLL_S):
        yield


def has_bar() -> bool:
    """Whether there is somebody to see a bar: standard error is a terminal, or this is a notebook."""
    from tqdm import auto, notebook

    return sys.stderr.isatty() or issubclass(auto.tqdm, notebook.tqdm_notebook)


class Bar:
    """A bar over all steps of all epochs, by tqdm; parameters as for :func:`shown`."""

    def __init__(self, store: Store, run_id: str) -> None:
        self._store = store
        self._run_id = run_id
        self._before = _progress(store, run_id)
        self._bar: Any = None

    def update(self) -> None:
        """Move the bar to where the training is; back, where it goes on from an earlier checkpoint."""
        found = _progress(self._store, self._run_id)
        if found is None or found == self._before:
            return
        self._before = found
        taken = (found.epoch - 1) * found.steps + found.step
        if self._bar is None:
            self._bar = _new_bar(found, taken)
        self._bar.n = taken
        self._bar.initial = min(self._bar.initial, taken)
        self._bar.set_description_str(f"epoch {found.epoch}/{found.epochs} step {found.step}/{found.steps}", False)
        loss = "" if found.loss is None else f", loss {found.loss:.4g}"
        self._bar.set_postfix_str(f"{found.rows_per_s:,.0f} rows/s{loss}", False)
        self._bar.refresh()

    def close(self) -> None:
        """Leave the bar as it is, and go to the next line."""
        if self._bar is not None:
            self._bar.close()


def _new_bar(progress: Progress, taken: int) -> Any:
    """Make the bar; what an earlier fit had done of the run counts for no speed."""
    from tqdm.auto import tqdm

    total = progress.epochs * progress.steps
    return tqdm(total=total, initial=taken, bar_format=_BAR, dynamic_ncols=True, delay=1e-9)


class Lines:
    """A line in the log for every epoch that has ended; parameters as for :func:`shown`."""

    def __init__(self, store: Store, run_id: str, epochs: int) -> None:
        self._store = store
        self._run_id = run_id
        self._epochs = epochs
        self._told = {record.key for record in _history(store, run_id)}

    def update(self) -> None:
        """Log the epochs that have ended since the last time."""
        for record in _history(self._store, self._run_id):
            if record.key not in self._told:
                self._told.add(record.key)
                logger.info("%s: %s", self._run_id, line_of(record, self._epochs))

    def close(self) -> None:
        """Do nothing: each line is whole."""


def line_of(record: EpochRecord, epochs: int) -> str:
    """Describe an epoch in a line."""
    metrics = ", ".join(f"{name} {value:.4g}" for name, value in record.metrics.items())
    text = f"epoch {record.epoch}/{epochs}: {metrics}; {record.seconds:.1f} s, {record.rows_per_s:,.0f} rows/s"
    slowest = record.slowest
    return text if slowest is None else f"{text}; slowest rank {slowest.rank} on {slowest.host}"


def _progress(store: Store, run_id: str) -> Progress | None:
    try:
        return read_progress(store, run_id)
    except StoreError as exc:
        logger.debug("no progress: %s", exc)
        return None


def _history(store: Store, run_id: str) -> Sequence[EpochRecord]:
    try:
        return read_history(store, run_id)
    except StoreError as exc:
        logger.debug("no history: %s", exc)
        return ()
