"""Keeps the state of a Keras training, and goes on from the last one that was kept."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from hvdspark.estimators.keras.optimizer import LearningRateScale
from hvdspark.estimators.keras.snapshot import Snapshot
from hvdspark.estimators.keras.spec import KerasSpec

from hvdspark.data.summary import differing
from hvdspark.errors import ParamError, StoreError
from hvdspark.plan import FitPlan
from hvdspark.runs import run_folder
from hvdspark.store import Store
from hvdspark.worker.checkpoint import Checkpoints
from hvdspark.worker.session import Session
from hvdspark.worker.state import StateFiles

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where a training is.

    Parameters
    ----------
    step
        Steps that were taken, of all epochs.
    logs
        The metrics of the last epoch that ended.
    stopped
        Whether a callback has ended the training.
    """

    step: int
    logs: Mapping[str, float] = field(default_factory=dict)
    stopped: bool = False


class States:
    """The states of one training, seen from one rank; all ranks call the same in the same order.

    Parameters
    ----------
    plan, spec, session
        The training.
    snapshot
        What there is to remember.
    rate
        By what the learning rate is multiplied.
    checkpoints
        Knows the best epoch so far.
    """

    def __init__(
        self,
        plan: FitPlan,
        spec: KerasSpec,
        session: Session,
        snapshot: Snapshot,
        rate: LearningRateScale,
        checkpoints: Checkpoints,
    ) -> None:
        self._plan = plan
        self._session = session
        self._snapshot = snapshot
        self._rate = rate
        self._checkpoints = checkpoints
        context = session.context
        store = Store.from_ref(plan.store).within(run_folder(plan.run_id))
        self._files = StateFiles(store, plan.run_id, context.rank, context.size, spec.keep_checkpoints)
        latest = self._files.latest(self._fits) if session.is_first else None
        self._latest = int(session.gather(-1 if latest is None else latest, "hvdspark_resume")[0])

    @property
    def exist(self) -> bool:
        """Whether there is a state to go on from."""
        return self._latest >= 0

    def resume(self) -> Place:
        """Go on from the last state that is whole; returns where that is.

        Raises
        ------
        ParamError
            When the run was begun with other settings, or other rows.
        CorruptDatasetError
            When it was begun with another model.
        """
        if not self.exist:
            return Place(0)
        state = self._files.load(self._latest)
        self._check(state.info["settings"], state.info["rows"])
        self._snapshot.restore(state.shared, state.own)
        # A rank that is new has callbacks that know what the first rank's knew.
        self._snapshot.restore_callbacks(state.first if state.own is None else state.own)
        self._rate.rescale(state.info["rate_factor"])
        self._checkpoints.best_value = state.info["best_value"]
        place = Place(state.step, state.info["logs"], state.info["stopped"])
        steps, before = self._plan.steps_per_epoch, state.info["steps_per_epoch"]
        if steps != before:
            place = replace(place, step=state.step // before * steps)
            # The states so far are numbered by other steps: the last must not be one of them.
            if self.keep(place) and self._session.is_first:
                self._files.clear(but=place.step)
        if self._session.is_first:
            logger.info(
                "going on from the checkpoint at epoch %d, step %d", place.step // steps + 1, place.step % steps
            )
        return place

    def keep(self, place: Place) -> bool:
        """Write a state; where that fails, the training goes on all the same, and earlier states are there still.

        Returns
        -------
        bool
            On rank 0 whether it is whole.
        """
        error: StoreError | None = None
        try:
            self._files.write_own(place.step, self._snapshot.own())
        except StoreError as exc:
            error = exc
        is_incomplete = self._session.any(error is not None, "hvdspark_state")
        if self._session.is_first:
            error = error or (None if is_incomplete else self._publish(place))
            if error is not None or is_incomplete:
                self._discard(place)
        if error is not None:
            logger.warning("no checkpoint of step %d: %s", place.step, error)
        return error is None and not is_incomplete

    def _publish(self, place: Place) -> StoreError | None:
        if self._checkpoints.is_behind:
            # Who goes on from there would take an older model for the best.
            return StoreError("the best model could not be written", url="")
        # On another number of ranks only a whole epoch can be gone on from.
        epoch = place.step - place.step % self._plan.steps_per_epoch
        try:
            self._files.publish(place.step, self._snapshot.shared(), self._info(place), spared=epoch)
        except StoreError as exc:
            return exc
        return None

    def _discard(self, place: Place) -> None:
        """Make room: what is left of a state helps nobody."""
        with contextlib.suppress(StoreError):
            self._files.discard(place.step)

    def clear(self) -> None:
        """Remove all states: the model is in the Store."""
        try:
            self._files.clear()
        except StoreError as exc:
            logger.warning("checkpoints are left: %s", exc)

    def _fits(self, step: int, info: Mapping[str, Any]) -> bool:
        """Whether a state can be gone on from: within an epoch only where every rank has the same rows left."""
        plan, steps = self._plan, info["steps_per_epoch"]
        is_alike = steps == plan.steps_per_epoch and info["ranks"] == self._session.context.size
        # Rows that Spark's tasks hand over come as the query gives them anew, and nothing tells whether that is alike.
        return step % steps == 0 or (is_alike and plan.train.shares is None)

    def _info(self, place: Place) -> dict[str, Any]:
        return {
            "settings": self._settings(),
            "rows": dict(self._plan.summary),
            "steps_per_epoch": self._plan.steps_per_epoch,
            "ranks": self._session.context.size,
            "rate_factor": self._rate.factor,
            "best_value": self._checkpoints.best_value,
            "logs": {name: float(value) for name, value in place.logs.items()},
            "stopped": place.stopped,
        }

    def _settings(self) -> dict[str, Any]:
        """Name what must be the same for a training to go on."""
        plan = self._plan
        return {
            "rows": plan.train.rows,
            "batch_size": plan.train.batch_rows,
            "random_seed": plan.seed,
            "shuffle": plan.shuffle,
        }

    def _check(self, before: Mapping[str, Any], rows: Mapping[str, float]) -> None:
        for name, value in self._settings().items():
            if before.get(name) != value:
                raise ParamError(
                    f"run_id='{self._plan.run_id}' was begun with {name}={before.get(name)}, and now it is {value};"
                    " give another run_id, or what the run began with",
                    param="run_id",
                )
        other = differing(rows, self._plan.summary)
        if other is not None and self._plan.train.shares is not None:
            # Spark's tasks computed them anew, also for a restart, and the query may depend on chance.
            logger.warning("the rows are not those that the run was begun with: the %s is not what it was", other)
        elif other is not None:
            raise ParamError(
                f"run_id='{self._plan.run_id}' was begun with other rows, though as many (the {other} is not what it"
                " was); give another run_id, or the rows that the run began with",
                param="run_id",
            )
