"""What a job ends with, and the notes by which it goes on when it was interrupted."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self

from hvdspark.errors import StoreError
from hvdspark.plain import numbers, to_json
from hvdspark.runs import NOTES, RESULT, run_folder
from hvdspark.store import Store

logger = logging.getLogger(__name__)

State = Literal["finished", "failed", "interrupted", "running", "checked"]


@dataclass(frozen=True)
class JobResult:
    """What a job ends with; the last line that ``hvdspark train`` prints.

    Parameters
    ----------
    run_id
        The run; ``None`` where it failed before there was one.
    state
        ``"finished"``, ``"failed"``, ``"interrupted"``, ``"running"`` where another driver is at the run, or
        ``"checked"`` where no more was asked for.
    exit_code
        See :mod:`hvdspark.cli.exits`.
    model
        Address of the saved ``PipelineModel``.
    metrics
        Of the held-out rows (``val_loss``, …); empty without an evaluation.
    training
        The training's own metrics, of its last epoch.
    champion
        Run and metrics of the model that it was compared with, on the same rows.
    promoted
        Whether the alias refers to the model now; ``None`` where nothing was to be promoted.
    cause
        The first line of the error; for a model that was not promoted, the numbers that kept it; for a configuration
        that was checked, what could not be.
    error
        Class of the error.
    seconds
        Wall time of the driver that ended it.
    """

    run_id: str | None
    state: State
    exit_code: int
    model: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    training: Mapping[str, float] = field(default_factory=dict)
    champion: Mapping[str, Any] | None = None
    promoted: bool | None = None
    cause: str | None = None
    error: str | None = None
    seconds: float = 0.0

    def to_json(self) -> str:
        """Return it as one line of JSON; numbers that JSON lacks become ``null``."""
        return to_json(asdict(self), ensure_ascii=False)

    def publish(self, store: Store) -> None:
        """Leave it in the run's folder; a Store that cannot take it is a warning."""
        assert self.run_id is not None
        try:
            store.publish_bytes(self.to_json().encode(), run_folder(self.run_id), RESULT)
        except (StoreError, OSError) as exc:
            logger.warning("cannot leave the result of %s in the Store: %s", self.run_id, exc)


def read_result(store: Store, run_id: str) -> JobResult | None:
    """Return what a job left in its run; ``None`` where that is nothing, or makes no sense; errors as for reading."""
    values = store.read_json(run_folder(run_id), RESULT)
    try:
        return None if values is None else JobResult(**values)
    except TypeError:
        return None


@dataclass(frozen=True)
class Notes:
    """How far a job has come, so that the next driver goes on from there.

    Parameters
    ----------
    config
        Digests of the sections of the configuration with which the run began.
    warm_start
        The model whose weights it began with.
    prepared
        Whether the fitted stages are saved.
    model
        Address of the saved pipeline, once it is whole.
    training
        The training's own metrics, of its last epoch.
    metrics, champion, promote, reason
        What the evaluation found and the gate decided; ``metrics`` is ``None`` before that.
    """

    config: Mapping[str, str]
    warm_start: str | None = None
    prepared: bool = False
    model: str | None = None
    training: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] | None = None
    champion: Mapping[str, Any] | None = None
    promote: bool | None = None
    reason: str | None = None

    @classmethod
    def read(cls, store: Store, run_id: str) -> Self | None:
        """Return the notes of a run; ``None`` where there are none, or none that make sense; errors as for reading."""
        values = store.read_json(run_folder(run_id), NOTES)
        try:
            return None if values is None else cls(**values)._with_numbers()
        except (TypeError, ValueError, AttributeError):
            return None

    def _with_numbers(self) -> Self:
        metrics = None if self.metrics is None else numbers(self.metrics)
        return replace(self, training=numbers(self.training), metrics=metrics)

    def with_(self, store: Store, run_id: str, **changes: Any) -> Self:
        """Write down how far it is now; raises :class:`StoreError` where that cannot be."""
        changed = replace(self, **changes)
        store.publish_bytes(to_json(asdict(changed)).encode(), run_folder(run_id), NOTES)
        return changed
