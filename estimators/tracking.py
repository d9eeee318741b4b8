"""Logs fits to MLflow, from the driver, where the estimator's parameter ``mlflow`` says so.

It goes where the user's own logging goes: the tracking server and the experiment that are set, and the run that is
active. A run that was begun here is ended here, and the user's own is not. What MLflow refuses before the training ends
the fit; afterwards it costs a warning, and never the model.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from hvdspark.estimators.watching import watched

from hvdspark.errors import ParamError, StoreError
from hvdspark.history import EpochRecord, read_history
from hvdspark.plan import TrainResult
from hvdspark.recording import Recording, first_line
from hvdspark.registry import flatten
from hvdspark.store import Store
from hvdspark.versions import command_for

if TYPE_CHECKING:
    from hvdspark.estimators.base import HorovodModel
    from mlflow.entities import Metric

logger = logging.getLogger(__name__)

RUN_ID = "hvdspark.run_id"

# What MLflow takes in one request, and as one value.
_MOST_PARAMS, _MOST_METRICS, _LONGEST = 100, 1000, 6000
_ODD = re.compile(r"[^\w\-. :/]")

# People watch epochs of minutes there, and a server is asked for something every time.
_POLL_S = 2.0


class Tracking:
    """Logs nothing."""

    def following(self) -> AbstractContextManager[None]:
        """Log the epochs as they end, for the time of a block in which the ranks train."""
        return contextlib.nullcontext()

    def finish(self, result: TrainResult, model: HorovodModel) -> None:
        """Log what came out."""


class MlflowTracking(Tracking):
    """Logs to one run of MLflow's.

    Parameters
    ----------
    mlflow
        The module.
    recording
        The fit.
    store
        Where its history is.
    mlflow_run_id
        The run.
    """

    def __init__(self, mlflow: Any, recording: Recording, store: Store, mlflow_run_id: str) -> None:
        self._client = mlflow.MlflowClient()
        self._recording = recording
        self._store = store
        self._mlflow_run_id = mlflow_run_id
        # By their keys: an epoch that was trained anew after a restart is another one.
        self._seen: set[tuple[int, float]] = set()
        self._logged: set[tuple[int, float]] = set()
        # A watcher that waits for a slow server may still be at it when the fit has ended.
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Log what the fit is asked to do."""
        record = self._recording.record
        found = flatten(record.params)
        params = [(_ODD.sub("_", name), str(value)[:_LONGEST]) for name, value in found.items()]
        for first in range(0, len(params), _MOST_PARAMS):
            self._log("parameters", self._log_params, params[first : first + _MOST_PARAMS])
        tags = {RUN_ID: record.run_id, "hvdspark.store": self._store.url}
        self._log("tags", self._set_tags, {**tags, **{f"version.{k}": v for k, v in record.versions.items()}})

    def following(self) -> AbstractContextManager[None]:
        """Log the epochs as they end."""
        return watched(self, "logging epochs to MLflow", _POLL_S)

    def update(self) -> None:
        """Log the epochs that have ended by now, and those that MLflow has not taken before."""
        written = self._written(logging.DEBUG)
        fresh = {epoch.key for epoch in written} - self._seen
        if fresh:
            # Of an epoch that was not taken there is a warning, not one at every look.
            self._seen |= fresh
            self._log_written(written)

    def close(self) -> None:
        """Do nothing: :meth:`log_epochs` comes after it."""

    def finish(self, result: TrainResult, model: HorovodModel) -> None:
        """Log what is not logged yet of the metrics, what is known of the rows, and the model."""
        self.log_epochs(result.history)
        data = {f"data.{name}": str(value) for name, value in self._recording.record.data.items() if name != "columns"}
        self._log("tags", self._set_tags, data)
        self._log("the model", model._log_to_mlflow)

    def log_epochs(self, history: Mapping[str, Sequence[float]]) -> None:
        """Log what is not logged yet of the epochs: what the run's folder tells of them, or a history."""
        written = self._written(logging.WARNING)
        if written:
            self._log_written(written)
            return
        now, known = time.time(), {epoch for epoch, _ in self._logged}
        self._log_metrics(
            (name, float(value), now, epoch)
            for name, values in history.items()
            for epoch, value in enumerate(values, 1)
            if epoch not in known
        )

    def _written(self, level: int) -> Sequence[EpochRecord]:
        """Return what the run's folder tells of its epochs; nothing where that is damaged, with a line in the log."""
        try:
            return read_history(self._store, self._recording.record.run_id)
        except StoreError as exc:
            logger.log(level, "%s: MLflow gets no times of epochs: %s", self._recording.record.run_id, exc)
            return ()

    def _log_written(self, written: Sequence[EpochRecord]) -> None:
        with self._lock:
            fresh = [epoch for epoch in written if epoch.key not in self._logged]
            found = (
                (name, value, epoch.ended, epoch.epoch) for epoch in fresh for name, value in epoch.metrics.items()
            )
            if self._log_metrics(found):
                self._logged.update(epoch.key for epoch in fresh)

    def _log_metrics(self, values: Iterable[tuple[str, float, float, int]]) -> bool:
        """Log values with their names, times and epochs; ``False`` when not all were taken."""
        from mlflow.entities import Metric

        metrics = [Metric(_ODD.sub("_", name), value, int(1000 * when), epoch) for name, value, when, epoch in values]
        batches = [metrics[first : first + _MOST_METRICS] for first in range(0, len(metrics), _MOST_METRICS)]
        # Each is tried, whatever becomes of those before.
        taken = [self._log("metrics", self._send_metrics, batch) for batch in batches]
        return all(taken)

    def _send_metrics(self, metrics: Sequence[Metric]) -> None:
        self._client.log_batch(self._mlflow_run_id, metrics=metrics)

    def _log_params(self, params: Sequence[tuple[str, str]]) -> None:
        from mlflow.entities import Param

        self._client.log_batch(self._mlflow_run_id, params=[Param(name, value) for name, value in params])

    def _set_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self._client.log_batch(self._mlflow_run_id, tags=[RunTag(name, value) for name, value in tags.items()])

    def _log(self, what: str, act: Callable[..., object], *arguments: Any) -> bool:
        try:
            act(*arguments)
        except Exception as exc:  # noqa: BLE001 - a log must not cost what is logged
            logger.warning("%s: MLflow did not take %s: %s", self._recording.record.run_id, what, first_line(exc))
            return False
        return True


@contextlib.contextmanager
def tracked(recording: Recording, store: Store, *, is_wanted: bool) -> Iterator[Tracking]:
    """Log a fit for the time of a block, and how it ends.

    Parameters
    ----------
    recording
        The fit.
    store
        Where its history is.
    is_wanted
        Whether to log at all.

    Raises
    ------
    ParamError
        When MLflow is not installed, or does not answer.
    """
    if not is_wanted:
        yield Tracking()
        return
    mlflow = require_mlflow()
    run_id, is_own = _begin(mlflow, recording)
    recording.note(mlflow_run_id=run_id)
    recording.publish()
    tracking = MlflowTracking(mlflow, recording, store, run_id)
    status = "FINISHED"
    try:
        tracking.begin()
        yield tracking
    except BaseException as exc:
        status = "FAILED" if isinstance(exc, Exception) else "KILLED"
        tracking.log_epochs({})
        raise
    finally:
        if is_own:
            _quietly_end(mlflow, status)


def require_mlflow() -> Any:
    """Return the module; raises :class:`ParamError` where it is not installed."""
    try:
        import mlflow
    except ImportError as exc:
        raise ParamError(
            f"mlflow=True, but MLflow cannot be imported on the driver: {exc}. Leave mlflow out, or"
            f" {command_for('mlflow')}",
            param="mlflow",
        ) from exc
    return mlflow


def _begin(mlflow: Any, recording: Recording) -> tuple[str, bool]:
    """Take the run that is active, or begin one; returns its id, and whether it is to be ended here."""
    record = recording.record
    try:
        active = mlflow.active_run()
        if active is not None:
            run_id = str(active.info.run_id)
            known = mlflow.MlflowClient().get_run(run_id).data.tags.get(RUN_ID)
            if known is None or known == record.run_id:
                return run_id, False
        elif record.mlflow_run_id is not None:
            # It goes on where it was interrupted, unless that run is no longer there.
            with contextlib.suppress(mlflow.exceptions.MlflowException):
                return str(mlflow.start_run(run_id=record.mlflow_run_id).info.run_id), True
        # Of several fits in one run of the user's, each but the first has a run of its own within it.
        return str(mlflow.start_run(run_name=record.run_id, nested=active is not None).info.run_id), True
    except Exception as exc:
        raise ParamError(
            f"mlflow=True, but MLflow at {mlflow.get_tracking_uri()} does not begin a run: {first_line(exc)}. Check"
            " MLFLOW_TRACKING_URI, or leave mlflow out",
            param="mlflow",
        ) from exc


def _quietly_end(mlflow: Any, status: str) -> None:
    try:
        mlflow.end_run(status)
    except Exception as exc:  # noqa: BLE001 - a log must not cost what is logged
        logger.warning("MLflow did not take that the run is %s: %s", status, first_line(exc))
