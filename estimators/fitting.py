"""One ``fit``: the way from a DataFrame to a trained model.

::

    parameters -> check the schema -> dataset -> shards -> barrier stage -> model file in the Store -> Model
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import cloudpickle
from hvdspark.estimators.facts import OPERATIONAL, SCORING, artefacts_of, data_facts, kept_metrics, params_of
from hvdspark.estimators.outputs import planned_outputs
from hvdspark.estimators.progress import shown
from hvdspark.estimators.sources import RowSource, Work, WorkFor
from hvdspark.estimators.starting import find_start
from hvdspark.estimators.tracking import Tracking, require_mlflow, tracked
from pyspark.sql.types import StructType

from hvdspark.data.feed import FedStage
from hvdspark.data.partitions import Split
from hvdspark.data.planning import FitDraft
from hvdspark.errors import (
    LaunchError,
    NotEnoughSlotsError,
    ParamError,
    RunInProgressError,
    StoreError,
    WorkerFailedError,
)
from hvdspark.history import EpochRecord, by_metric, read_history
from hvdspark.launch.barrier import run_barrier, warm_up
from hvdspark.launch.options import LaunchOptions
from hvdspark.launch.slots import await_slots, check_slots, count_slots
from hvdspark.launch.transport import check_transport
from hvdspark.lease import is_held
from hvdspark.plain import to_json
from hvdspark.plan import BatchSpec, ColumnSpec, FitPlan, TrainResult
from hvdspark.predict import scored_schema
from hvdspark.recording import Recording, recorded
from hvdspark.retention import discard
from hvdspark.runs import (
    JOB,
    busy,
    in_progress,
    is_in_progress,
    is_removed,
    log_folder,
    next_attempt,
    published_model,
    run_folder,
    stored_record,
)
from hvdspark.store import Store, require_store
from hvdspark.versions import package_versions
from hvdspark.warmstart import WarmStart, keep_start, recall_start

if TYPE_CHECKING:
    from hvdspark.estimators.base import HorovodEstimator, HorovodModel
    from pyspark.sql import SparkSession

logger = logging.getLogger(__name__)


class Fit:
    """One fit: its plan, its run folder and the time each phase took.

    Parameters
    ----------
    estimator
        What to fit, with all its values converted.
    source
        The rows.
    job
        The record of the job that the fit is a part of, which closes it; by default the fit has a record of its own.
    """

    _recording: Recording
    _tracking: Tracking

    def __init__(self, estimator: HorovodEstimator, source: RowSource, job: Recording | None = None) -> None:
        self._estimator = estimator
        self._source = source
        self._job = job
        self._phases: dict[str, float] = {}
        self._start: WarmStart | None = None
        self._run_id = estimator._value("run_id") or new_run_id(estimator._kind)

    def run(self) -> HorovodModel:
        """Fit, and return the model."""
        estimator, session = self._estimator, self._source.session
        with self._timed("check"):
            store = self._checked_store()
            checked = None if self._trained(store) else self._check(session, store)
        with ExitStack() as stack:
            # Nothing is left of a run whose record cannot be written.
            stack.callback(store.delete_if_empty, run_folder(self._run_id))
            stack.enter_context(in_progress(store, self._run_id))
            self._refuse_job(store)
            # Another fit may have trained it, or somebody removed it, since it was looked at.
            trained = self._trained(store)
            if trained is not None:
                result = self._recalled(store, trained, stack)
            else:
                result = self._train(store, *(checked or self._check(session, store)), stack)
            with self._timed("publish"):
                model = estimator._make_model(store.read_bytes(result.model_path), result)
                metrics, epoch = kept_metrics(result.history, estimator._best_of())
                self._recording.note(artefacts=artefacts_of(store, result, self._run_id))
                if metrics:
                    self._recording.note(metrics=metrics, epoch=epoch)
                self._tracking.finish(result, model)
            if trained is None:
                self._account(result)
        model._resetUid(estimator.uid)
        estimator._copyValues(model)
        model._set(run_id=self._run_id)
        model._phases = dict(self._phases)
        return model

    def _train(self, store: Store, draft: FitDraft, options: LaunchOptions, stack: ExitStack) -> TrainResult:
        """Provide the rows, and have the ranks train."""
        estimator, session = self._estimator, self._source.session
        self._begin(store, draft, stack)
        with self._timed("write"):
            meanwhile = partial(warm_up, session, draft.size, options)
            work_for = stack.enter_context(self._source.provided(draft, meanwhile))
            work = work_for(draft.size)
        self._recording.note(data=data_facts(self._source.facts, draft, work))
        if self._start is not None:
            keep_start(store, self._run_id, self._start, estimator._suffix)
        display = shown(store, self._run_id, draft.epochs, estimator._value("verbose"))
        with self._timed("launch"), display, self._tracking.following():
            answers = self._launch(store, draft.size, work, work_for, options)
        # The answer came through Spark's own channel from a process that this fit started.
        result: TrainResult = cloudpickle.loads(answers[0])
        return result

    def _begin(self, store: Store, draft: FitDraft, stack: ExitStack) -> None:
        """Begin the run's record, and its run in MLflow where that is wanted."""
        if is_removed(store, self._run_id):
            discard(store, self._run_id)
        estimator = self._estimator
        if self._job is not None:
            self._phases = {**self._job.record.phases, **self._phases}
        facts: dict[str, Any] = {
            "kind": estimator._kind,
            "params": {**params_of(estimator), "num_proc": draft.size, "run_id": self._run_id},
            "versions": package_versions(),
            "data": data_facts({}, draft),
            # The very dictionary, so that the record has each phase as soon as it has ended.
            "phases": self._phases,
        }
        if self._job is None:
            self._recording = stack.enter_context(recorded(store, self._run_id, **facts))
        else:
            self._recording = self._job
            # What an earlier driver measured is not what comes now.
            self._job.note(**facts, hosts=(), artefacts={}, metrics={}, epoch=None)
            self._job.publish()
        self._track(store, stack)

    def _track(self, store: Store, stack: ExitStack) -> None:
        is_wanted = bool(self._estimator._value("mlflow"))
        self._tracking = stack.enter_context(tracked(self._recording, store, is_wanted=is_wanted))

    def _trained(self, store: Store) -> str | None:
        """Return the model of a run that was trained to its end, but whose driver died before it could say so.

        Raises
        ------
        ParamError
            When it is finished.
        """
        path = published_model(store, self._run_id)
        if path is None or is_removed(store, self._run_id):
            return None
        record = stored_record(store, self._run_id)
        state = "without a record" if record is None else record.state
        if self._job is None and state in ("finished", "damaged", "without a record"):
            raise ParamError(
                f"run_id='{self._run_id}' exists already in {store} and is {state}; give another one, or none for a new"
                " one",
                param="run_id",
            )
        return path

    def _recalled(self, store: Store, path: str, stack: ExitStack) -> TrainResult:
        """Return what the ranks of a run came to, whose driver did not live to take it; close its record."""
        estimator = self._estimator
        self._refuse_other_params(store)
        logger.info("%s is trained to its end already, and is not trained again", self._run_id)
        if self._job is None:
            self._recording = stack.enter_context(recorded(store, self._run_id, goes_on=True))
        else:
            self._recording = self._job
        self._track(store, stack)
        inputs, outputs = estimator._describe_trained(store.read_bytes(path))
        epochs = recalled_epochs(store, self._run_id)
        return TrainResult(
            by_metric(epochs),
            path,
            phases={},
            # Only the ranks knew these.
            rows_per_s=0.0,
            data_wait_share=0.0,
            inputs=tuple(inputs or ()),
            outputs=tuple(outputs or ()),
            epochs=tuple(epoch.to_plain() for epoch in epochs),
        )

    def _refuse_other_params(self, store: Store) -> None:
        """Raise where what is trained already is not what this fit is to train."""
        record = stored_record(store, self._run_id)
        if record is None or not record.params:
            return
        now = json.loads(to_json(params_of(self._estimator)))
        for param in self._estimator.params:
            before, value = record.params.get(param.name), now.get(param.name)
            if before != value and param.name not in OPERATIONAL | SCORING:
                raise ParamError(
                    f"run_id='{self._run_id}' was trained with {param.name}={before!r}, and now it is {value!r}; give"
                    " another run_id, or what the run was trained with",
                    param="run_id",
                )

    def _launch(self, store: Store, wanted: int, work: Work, work_for: WorkFor, options: LaunchOptions) -> list[bytes]:
        """Run the ranks, and again from their last checkpoint when some were killed or lost."""
        size, first, lost = wanted, next_attempt(store, self._run_id), None
        restarts = self._estimator._value("max_restarts")
        for restart in range(restarts + 1):
            logs = log_folder(self._run_id, first + restart)
            try:
                return self._attempt(size, work, replace(options, logs=logs))
            except NotEnoughSlotsError as exc:
                if lost is None:
                    raise
                # What was lost tells more than that it is missing now.
                raise lost from exc
            except (WorkerFailedError, LaunchError) as exc:
                if not exc.is_passing or restart == restarts:
                    raise
                cause = str(exc).partition("\n")[0]
                logger.warning("%s: %s; restart %d of %d", self._run_id, cause, restart + 1, restarts)
                lost = exc
            now = self._size_now(wanted, options)
            if now != size:
                logger.warning("%s: goes on with %d ranks in place of %d", self._run_id, now, size)
                size, work = now, work_for(now)
        raise AssertionError("the last attempt returns or raises")

    def _attempt(self, size: int, work: Work, options: LaunchOptions) -> list[bytes]:
        """Run the ranks once."""
        job, session = self._estimator._job(), self._source.session
        with self._recording.attempt(size):
            if isinstance(work, FedStage):
                return run_barrier(session, size, cloudpickle.dumps(job), options, work)
            self._describe(work)
            return run_barrier(session, size, cloudpickle.dumps(job.after(work)), options)

    def _first_size(self, store: Store, wanted: int, options: LaunchOptions) -> int:
        """Return how many ranks to begin with: all that are wanted, or fewer in a run that goes on, where it may.

        Raises
        ------
        NotEnoughSlotsError, LaunchError
            As :func:`~hvdspark.launch.slots.check_slots`.
        """
        goes_on = next_attempt(store, self._run_id) > 1 and not is_removed(store, self._run_id)
        size = self._size_now(wanted, options) if goes_on else wanted
        check_slots(self._source.session, size, options.slots_timeout_s)
        if size != wanted:
            logger.warning("%s: goes on with %d ranks in place of %d", self._run_id, size, wanted)
        return size

    def _size_now(self, wanted: int, options: LaunchOptions) -> int:
        """Return how many ranks to go on with: fewer than were wanted where that is allowed and no more can be had."""
        fewest = self._estimator._value("min_proc") or wanted
        if fewest == wanted:
            return wanted
        return max(fewest, min(wanted, await_slots(self._source.session, wanted, options.slots_timeout_s)))

    def _checked_store(self) -> Store:
        """Return the Store; raises where it cannot be one, or another is at the run."""
        store = require_store(self._estimator._required("store"))
        if self._job is None and is_in_progress(store, self._run_id):
            raise RunInProgressError(busy(self._run_id), run_id=self._run_id)
        return store

    def _refuse_job(self, store: Store) -> None:
        """Leave a run alone that a job is at, be it with what comes after the training."""
        if self._job is None and is_held(store, run_folder(self._run_id), JOB):
            raise RunInProgressError(busy(self._run_id), run_id=self._run_id)

    def _check(self, session: SparkSession, store: Store) -> tuple[FitDraft, LaunchOptions]:
        """Find every error that can be found without a Spark job; returns what the fit goes by."""
        estimator = self._estimator
        estimator._check()
        if estimator._value("mlflow"):
            require_mlflow()
        self._source.check(estimator._value("validation"))
        columns, batch = estimator._batch(self._source.schema)
        _, outputs = estimator._describe()
        if outputs is not None:
            # What transform would refuse is found out now, not after the training.
            scored_schema(StructType(), planned_outputs(estimator, outputs))
        num_proc = estimator._value("num_proc") or count_slots(session)
        min_proc = estimator._value("min_proc")
        if min_proc is not None and min_proc > num_proc:
            raise ParamError(
                f"min_proc={min_proc} is more than the {num_proc} ranks of the fit; give as many at most, or leave it"
                " out to go on with all ranks only",
                param="min_proc",
            )
        draft = self._draft(store, columns, batch, num_proc)
        options = estimator._launch_options(self._run_id, store)
        check_transport(session, allow_insecure=options.allow_insecure_transport)
        draft = replace(draft, size=self._first_size(store, num_proc, options))
        store.check_writable()
        self._find_start(store, session)
        return draft, options

    def _find_start(self, store: Store, session: SparkSession) -> None:
        """Read the weights to begin with, and check that they fit; a run that goes on has its own."""
        estimator, given = self._estimator, self._estimator._value("warm_start")
        self._start = recall_start(store, self._run_id, given, estimator._suffix)
        if self._start is None and given is not None:
            self._start = find_start(given, store, session, estimator._saved, estimator._suffix)
        if self._start is not None:
            estimator._start_from(self._start)
            self._say(f"begins with the weights of {self._start.model}")

    def _split(self) -> Split:
        validation = self._estimator._value("validation")
        seed = self._estimator._value("random_seed")
        if isinstance(validation, str):
            return Split(column=validation, seed=seed)
        return Split(fraction=validation or 0.0, seed=seed)

    def _draft(self, store: Store, columns: tuple[ColumnSpec, ...], batch: BatchSpec, num_proc: int) -> FitDraft:
        value = self._estimator._value
        return FitDraft(
            run_id=self._run_id,
            store=store.ref(),
            columns=columns,
            batch=batch,
            split=self._split(),
            size=num_proc,
            batch_rows=value("batch_size"),
            val_batch_rows=value("val_batch_size") or value("batch_size"),
            epochs=value("epochs"),
            shuffle=value("shuffle"),
            seed=value("random_seed"),
            reader_workers=value("train_reader_num_workers"),
            cache=self._estimator._cache(),
            train_steps_per_epoch=value("train_steps_per_epoch"),
            validation_steps_per_epoch=value("validation_steps_per_epoch"),
        )

    def _describe(self, plan: FitPlan) -> None:
        held_out = 0 if plan.val is None else plan.val.rows
        self._say(
            f"{plan.train.rows} training and {held_out} validation rows, {plan.train.size} ranks, {plan.train.steps}"
            " steps per epoch"
        )

    def _account(self, result: TrainResult) -> None:
        """Split the stage's time into what the launch cost and what the ranks did, and tell of it."""
        in_rank = sum(result.phases.values())
        publish = self._phases.pop("publish")
        self._phases["launch"] = max(0.0, self._phases["launch"] - in_rank)
        for name, seconds in result.phases.items():
            self._phases[name] = self._phases.get(name, 0.0) + seconds
        self._phases["publish"] = self._phases.get("publish", 0.0) + publish
        self._say("phases: " + ", ".join(f"{name} {seconds:.1f} s" for name, seconds in self._phases.items()))
        self._say(f"{result.rows_per_s:,.0f} rows per second; steps waited {result.data_wait_share:.1%} for rows")

    def _say(self, text: str) -> None:
        if self._estimator._value("verbose"):
            logger.info("%s: %s", self._run_id, text)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self._phases[phase] = time.perf_counter() - start


def recalled_epochs(store: Store, run_id: str) -> tuple[EpochRecord, ...]:
    """Return what the ranks of a run have left of its epochs; none where that is damaged, with a warning."""
    try:
        return read_history(store, run_id)
    except StoreError as exc:
        # The model is worth more than what was measured on the way to it.
        logger.warning("the history of %s is lost: %s", run_id, exc)
        return ()


def new_run_id(kind: str) -> str:
    """Make a run id that sorts by time."""
    return f"{kind}-{datetime.now(UTC):%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:8]}"
