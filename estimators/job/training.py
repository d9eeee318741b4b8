"""A training job, step by step; each step is noted in the run, so that another driver goes on after the last one.

::

    stages fitted -> trained -> pipeline saved -> evaluated beside the champion -> promoted or not
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from hvdspark.estimators.facts import OPERATIONAL
from hvdspark.estimators.fitting import new_run_id
from hvdspark.estimators.job.building import Building
from hvdspark.estimators.job.config import CANDIDATE, RUN_ID, JobConfig
from hvdspark.estimators.job.document import Document
from hvdspark.estimators.job.evaluation import Yardstick, keras_stage
from hvdspark.estimators.job.gate import Gate
from hvdspark.estimators.job.models import address_of, load_model
from hvdspark.estimators.job.places import spark_address
from hvdspark.estimators.job.result import JobResult, Notes, read_result
from hvdspark.estimators.job.rows import read_rows, require_rows, split_rows
from hvdspark.estimators.keras.estimator import KerasEstimator
from hvdspark.estimators.keras.model import KerasModel
from pyspark.errors import AnalysisException, IllegalArgumentException
from pyspark.ml import Pipeline, PipelineModel
from pyspark.ml.base import Transformer
from pyspark.sql import DataFrame, SparkSession

from hvdspark.aliases import AliasEntry, promote, read_alias
from hvdspark.errors import (
    AliasConflictError,
    ConfigError,
    ModelFormatError,
    ParamError,
    RunInProgressError,
    StoreError,
)
from hvdspark.lease import held, is_held
from hvdspark.plain import numbers
from hvdspark.plan import ModelTensor
from hvdspark.recording import Recording, record_stillborn, recorded
from hvdspark.registry import flatten
from hvdspark.retention import discard
from hvdspark.runs import (
    JOB,
    PIPELINE,
    PREPARATION,
    RESULT,
    in_progress,
    is_removed,
    published_model,
    read_record,
    run_folder,
)
from hvdspark.store import Store
from hvdspark.warmstart import START, pinned
from hvdspark.worker.checkpoint import CHECKPOINTS

logger = logging.getLogger(__name__)

# The sections of a configuration that a run must go on with.
_DECISIVE = ("input", "pipeline", "pipeline_args", "estimator", "evaluation")

_SECRET = re.compile(r"password|passwd|secret|token|credential|key", re.IGNORECASE)

# How often a model is compared anew when, while it was compared, another one was promoted.
_COMPARISONS = 3


@dataclass(frozen=True)
class _Rows:
    """The rows of a job, lazily."""

    train: DataFrame
    held_out: DataFrame | None


class TrainJob:
    """What a configuration describes.

    Parameters
    ----------
    config, document
        The configuration, and the file it is from.
    store
        The opened Store.

    Attributes
    ----------
    run_id : str
        The run: the configuration's, or a new one.
    has_begun : bool
        Whether the run has left anything in the Store by this job's doing.
    """

    _recording: Recording

    def __init__(self, config: JobConfig, document: Document, store: Store) -> None:
        self._config = config
        self._document = document
        self._store = store
        self.has_begun = False
        self._started = time.time()
        self.run_id = config.run_id or new_run_id("job")
        self._folder = run_folder(self.run_id)
        self._gate = None if config.promote_if is None else Gate.parse(config.promote_if)

    def finished(self) -> JobResult | None:
        """Return the result of the run where it is finished already; nothing is trained then.

        Raises
        ------
        ParamError
            When it is the result of another configuration.
        """
        found = self._final_result()
        if found is None:
            return None
        changed = self._checked_changes(Notes.read(self._store, self.run_id))
        if changed:
            logger.warning("%s finished with another configuration (%s)", self.run_id, ", ".join(changed))
        logger.info("%s is finished already; this is its result", self.run_id)
        return found

    def _final_result(self) -> JobResult | None:
        found = read_result(self._store, self.run_id)
        is_final = found is not None and found.state == "finished" and not is_removed(self._store, self.run_id)
        return found if is_final else None

    def run(self, session: SparkSession, building: Building) -> JobResult:
        """Do what is still to be done.

        Raises
        ------
        RunInProgressError
            When another driver is at it.
        HvdSparkError
            What went wrong otherwise.
        """
        with self._alone():
            # Another driver may have come to its end since one last looked.
            found = self.finished()
            if found is None:
                found = self._run(session, building)
                found.publish(self._store)
            return found

    def leave(self, failure: JobResult) -> None:
        """Leave in the run what ended this driver, unless another one is at the run, or it is finished."""
        try:
            with self._alone():
                if self._final_result() is None:
                    if read_record(self._store, self.run_id) is None:
                        self._record_stillborn(failure)
                    failure.publish(self._store)
        except RunInProgressError:
            logger.warning("another driver is at %s, whose result it will leave", self.run_id)
        except (StoreError, OSError) as exc:
            logger.warning("cannot leave the result of %s in the Store: %s", self.run_id, exc)

    def _record_stillborn(self, failure: JobResult) -> None:
        """Let people find a run that ended before it began."""
        state: Literal["interrupted", "failed"] = "failed" if failure.state == "failed" else "interrupted"
        record_stillborn(self._store, self.run_id, state, self._started, failure.cause, KerasEstimator._kind)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the run, or raise where another driver does."""
        self._refuse_company()
        try:
            with held(self._store, self._folder, JOB) as own:
                # Of two that begin at once at least one sees the other here.
                self._refuse_company(own)
                yield
        finally:
            self._store.delete_if_empty(self._folder)

    def _refuse_company(self, own: str = "") -> None:
        if is_held(self._store, self._folder, but=own):
            raise RunInProgressError(
                f"another driver is at the run '{self.run_id}' in {self._store}; wait until it has ended, or give"
                " another run id",
                run_id=self.run_id,
            )

    def _run(self, session: SparkSession, building: Building) -> JobResult:
        if not is_removed(self._store, self.run_id):
            # Before anything of the run is changed.
            self._checked_changes(Notes.read(self._store, self.run_id))
        with self._recorded():
            return self._go_on(session, building)

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Keep the run's record, from before there is anything to train on until the model is promoted or not."""
        with ExitStack() as stack:
            # Nobody removes the run meanwhile.
            with in_progress(self._store, self.run_id):
                if is_removed(self._store, self.run_id):
                    discard(self._store, self.run_id)
                self._recording = stack.enter_context(
                    recorded(self._store, self.run_id, goes_on=True, kind=KerasEstimator._kind)
                )
            self.has_begun = True
            yield

    def _go_on(self, session: SparkSession, building: Building) -> JobResult:
        # What an earlier driver came to is history; one that is killed now leaves no word.
        self._store.delete(self._folder, RESULT)
        notes = self._begin()
        if notes.model is None:
            notes = self._train(session, building, notes)
        assert notes.model is not None
        self._recording.note(artefacts={**self._recording.record.artefacts, "pipeline": notes.model})
        for comparison in range(_COMPARISONS):
            if notes.metrics is None:
                with self._recording.timed("evaluate"):
                    notes = self._compare(session, building, notes)
            assert notes.metrics is not None
            self._recording.note(held_out=numbers(notes.metrics), decision=notes.reason)
            try:
                with self._recording.timed("promote"):
                    self._promote(notes)
                self._recording.note(promoted=notes.promote)
                break
            except AliasConflictError as exc:
                if comparison + 1 == _COMPARISONS:
                    raise
                logger.warning("%s: %s", self.run_id, exc)
                notes = notes.with_(self._store, self.run_id, metrics=None, promote=None)
        return self._result(notes)

    def _begin(self) -> Notes:
        """Return the notes of the run, or begin them; what the run began with stays, also the weights."""
        config = _digests(self._config)
        notes = Notes.read(self._store, self.run_id)
        if notes is None:
            return Notes(config, self._warm_start()).with_(self._store, self.run_id)
        changed = self._checked_changes(notes)
        if not changed:
            return notes
        names = ", ".join(changed)
        logger.warning("%s goes on with another configuration than it began with (%s)", self.run_id, names)
        anew: dict[str, Any] = {}
        if any(_decides(name) for name in changed):
            # There is nothing but the stages, and those may come out otherwise now.
            anew["prepared"] = False
        if {"promote_if", "alias"} & set(changed):
            # What another gate has decided is not what this one does.
            anew |= {"metrics": None, "promote": None}
        return notes.with_(self._store, self.run_id, config=config, **anew)

    def _checked_changes(self, notes: Notes | None) -> list[str]:
        """Return the keys that are not as the run began with them.

        Raises
        ------
        ParamError
            When there is something of a training already that they do not fit.
        """
        if notes is None:
            return []
        config = _digests(self._config)
        changed = sorted(name for name in {*config, *notes.config} if config.get(name) != notes.config.get(name))
        refused = [name for name in changed if _decides(name)]
        if refused and self._has_trained():
            raise ParamError(
                f"the run '{self.run_id}' in {self._store} was begun with another configuration:"
                f" {', '.join(refused)} {'differs' if len(refused) == 1 else 'differ'}. Give another --run-id, or the"
                " configuration that the run was begun with",
                param="run_id",
            )
        return changed

    def _has_trained(self) -> bool:
        """Whether the ranks have left anything that a training goes on from, or comes to."""
        kept = self._store.list(self._folder, CHECKPOINTS)
        is_kept = any(not name.startswith(f"{START}.") for name in kept)
        return is_kept or published_model(self._store, self.run_id) is not None

    def _warm_start(self) -> str | None:
        given = self._config.warm_start
        if given is None:
            return None
        # The model, not the name: who goes on later must not begin with another one's weights.
        found = pinned(self._store, given, awaited=(self._config.alias, CANDIDATE))
        if found is None:
            logger.warning("there is no '%s' in %s yet; the training begins with new weights", given, self._store)
        return found

    # Training

    def _train(self, session: SparkSession, building: Building, notes: Notes) -> Notes:
        # What would keep the gate from deciding is found before anything is fitted.
        champion = self._champion_model(session, building, self._champion())
        estimator = None
        if not building.needs_preparation:
            # What is wrong with it is found before the stages are fitted.
            estimator = building.estimator(self._store, self.run_id, notes.warm_start)
        rows = self._rows(session)
        if not notes.prepared:
            require_rows(rows.train, "rows to train on")
            if rows.held_out is not None:
                require_rows(rows.held_out, "held-out rows to evaluate the model on")
        if published_model(self._store, self.run_id) is None:
            # It is trained anew, or on, and that takes a time of its own.
            self._recording.note(phases={})
        with self._recording.timed("stages"):
            prepared, notes = self._prepare(session, building, rows, notes)
        if estimator is None:
            estimator = building.estimator(self._store, self.run_id, notes.warm_start, prepared)
        self._check_gate(building, estimator, prepared, rows, champion)
        # A run that is trained already, whose driver died then, is not trained again.
        model = estimator._fit(prepared.transform(rows.train), self._recording)
        assert isinstance(model, KerasModel)
        address = self._output(session)
        with self._recording.timed("save"):
            PipelineModel(stages=[*prepared.stages, model]).write().overwrite().save(address)
        last = {name: values[-1] for name, values in model.getHistory().items() if values}
        return notes.with_(self._store, self.run_id, model=address, training=last)

    def _prepare(
        self, session: SparkSession, building: Building, rows: _Rows, notes: Notes
    ) -> tuple[PipelineModel, Notes]:
        """Fit the stages, or load those that an earlier driver fitted: the ranks go on with the very same numbers."""
        stages = building.stages()
        if not stages:
            return PipelineModel(stages=[]), notes.with_(self._store, self.run_id, prepared=True)
        address = spark_address(session, self._store, self._folder, PREPARATION)
        if notes.prepared:
            return PipelineModel.load(address), notes
        prepared = Pipeline(stages=stages).fit(rows.train)
        prepared.write().overwrite().save(address)
        return prepared, notes.with_(self._store, self.run_id, prepared=True)

    def _rows(self, session: SparkSession) -> _Rows:
        config = self._config
        rows = read_rows(session, config.input)
        if config.evaluation is None:
            return _Rows(rows, None)
        return _Rows(*split_rows(session, rows, config.evaluation, config.input.window))

    def _output(self, session: SparkSession) -> str:
        if self._config.output is None:
            return spark_address(session, self._store, self._folder, PIPELINE)
        return self._config.output.replace(RUN_ID, self.run_id)

    # Evaluation and promotion

    def _check_gate(
        self,
        building: Building,
        estimator: KerasEstimator,
        prepared: PipelineModel,
        rows: _Rows,
        champion: Transformer | None,
    ) -> None:
        """Find out before the training what the gate would stumble over after it."""
        outputs = estimator.outputs
        if self._gate is None or not self._gate.conditions or outputs is None:
            return
        schema = prepared.transform(rows.train).schema
        yardstick = self._yardstick(building, outputs, estimator.label_columns)
        self._gate.check(yardstick.names(schema, estimator.label_columns))
        if champion is not None:
            assert rows.held_out is not None
            with self._comparing():
                yardstick.planned(champion, rows.held_out)

    def _yardstick(self, building: Building, outputs: Sequence[ModelTensor], labels: tuple[str, ...]) -> Yardstick:
        params = self._config.estimator.params
        return Yardstick(
            building.yardstick,
            tuple(outputs),
            building.custom_objects,
            params.get("sample_weight_col"),
            params.get("label_shapes"),
            labels,
        )

    def _compare(self, session: SparkSession, building: Building, notes: Notes) -> Notes:
        """Evaluate the model, and beside it the champion on the same rows, and have the gate decide."""
        metrics: Mapping[str, float] = {}
        champion, others = self._champion(), None
        held_out = self._rows(session).held_out
        if held_out is not None:
            # Two models read the rows, and from then on there is no doubt that they are the same.
            held_out = held_out.persist()
            try:
                assert notes.model is not None
                model = load_model(session, notes.model, self._store, building.custom_objects)
                last = keras_stage(model)
                yardstick = self._yardstick(building, last.outputs, last.label_columns)
                metrics = yardstick.measure(model, held_out)
                other = self._champion_model(session, building, champion)
                if other is not None:
                    with self._comparing():
                        others = yardstick.measure(other, held_out)
            finally:
                held_out.unpersist()
        verdict = None if self._gate is None else self._gate.decide(metrics, others)
        if verdict is not None:
            logger.info("%s: %s: %s", self.run_id, "promoted" if verdict.passed else "not promoted", verdict.reason)
        return notes.with_(
            self._store,
            self.run_id,
            metrics=metrics,
            champion=None if champion is None else {"run_id": champion.run_id, "metrics": others or {}},
            promote=None if verdict is None else verdict.passed,
            reason=None if verdict is None else verdict.reason,
        )

    def _champion(self) -> AliasEntry | None:
        """Return what the alias refers to, unless that is this run."""
        if self._gate is None:
            return None
        entry = read_alias(self._store, self._config.alias)
        return None if entry is not None and entry.run_id == self.run_id else entry

    def _champion_model(
        self, session: SparkSession, building: Building, champion: AliasEntry | None
    ) -> Transformer | None:
        """Load the champion, where there is one to compare with."""
        if champion is None or self._config.evaluation is None:
            return None
        model = None
        with self._comparing():
            address = address_of(session, self._store, champion)
            model = load_model(session, address, self._store, building.custom_objects)
        return model  # noqa: RET504 - none where the error was passed over

    @contextmanager
    def _comparing(self) -> Iterator[None]:
        """Say of a champion that cannot be compared what to do; a gate that does without it passes over that."""
        try:
            yield
        except (ConfigError, ModelFormatError, AnalysisException, IllegalArgumentException) as exc:
            reason = str(exc).strip().partition("\n")[0].rstrip(".")
            assert self._gate is not None
            if not self._gate.needs_current:
                logger.warning("%s: the champion is not compared: %s", self.run_id, reason)
                return
            alias = self._config.alias
            raise ParamError(
                f"the model that the alias '{alias}' refers to cannot be compared with a new one: {reason}. Let the"
                f" alias refer to another (hvdspark models rollback {alias}, or promote {alias} RUN), or promote this"
                " one without a comparison: --set promote_if=always",
                param="alias",
            ) from exc

    def _promote(self, notes: Notes) -> None:
        """Let the aliases refer to the model; raises ``AliasConflictError`` where the champion is another by now."""
        if self._gate is None:
            return
        assert notes.model is not None
        entry = AliasEntry(self.run_id, notes.model, notes.metrics or {})
        promote(self._store, CANDIDATE, entry)
        if notes.promote:
            promote(self._store, self._config.alias, entry, "" if notes.champion is None else notes.champion["run_id"])

    def _result(self, notes: Notes) -> JobResult:
        return JobResult(
            run_id=self.run_id,
            state="finished",
            exit_code=0,
            model=notes.model,
            metrics=notes.metrics or {},
            training=notes.training,
            champion=notes.champion,
            promoted=notes.promote,
            cause=notes.reason if notes.promote is False else None,
            seconds=round(time.time() - self._started, 3),
        )


def _digests(config: JobConfig) -> dict[str, str]:
    """Tell the values of a configuration from others, without what they are: addresses may hold secrets.

    Of what is called like a secret there is nothing, not even that: it may be another one in every try.
    """
    elsewhere = {"run_id", "store", "spark"}
    values = flatten(config.model_dump(mode="json", by_alias=True, exclude_defaults=True, exclude=elsewhere))
    return {
        name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        for name, value in values.items()
        if not (name.startswith("input.options.") and _SECRET.search(name)) and _parameter(name) != "backend_env"
    }


def _decides(name: str) -> bool:
    """Whether the value of that dotted name decides what a training or an evaluation comes to."""
    section = name.partition(".")[0]
    return section in _DECISIVE and _parameter(name) not in OPERATIONAL


def _parameter(name: str) -> str:
    """Return the parameter of the estimator that a dotted name is of, or nothing."""
    section, _, rest = name.partition(".")
    return rest.partition(".")[0] if section == "estimator" else ""
