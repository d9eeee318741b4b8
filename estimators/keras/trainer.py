"""Trains a Keras model in one rank. This runs in the training process, never in Spark."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from hvdspark.estimators.keras import lean  # isort: skip  # noqa: F401 - before Keras, which Horovod imports
import horovod.tensorflow as hvd
import keras
import numpy as np
import tensorflow as tf
from hvdspark.estimators.keras import codec, devices
from hvdspark.estimators.keras.agreement import Agreement, describe
from hvdspark.estimators.keras.allreduce import choose_allreduce
from hvdspark.estimators.keras.batches import ENDLESS, Batches, packer
from hvdspark.estimators.keras.callbacks import (
    act_at_end,
    callback_list,
    chosen,
    watch_losses,
    watch_steps,
    watch_validation_steps,
)
from hvdspark.estimators.keras.clock import Pace, StepClock
from hvdspark.estimators.keras.feeding import StepFeed
from hvdspark.estimators.keras.finite import FiniteGuard
from hvdspark.estimators.keras.journal import EpochHistory, Journal
from hvdspark.estimators.keras.metrics import current_metrics, global_metrics
from hvdspark.estimators.keras.optimizer import GradientReducer, LearningRateScale, changes_at_end
from hvdspark.estimators.keras.snapshot import Snapshot
from hvdspark.estimators.keras.spec import KerasSpec
from hvdspark.estimators.keras.states import Place, States
from hvdspark.estimators.keras.steps import TrainSteps, ValidationSteps, build_metrics
from hvdspark.estimators.keras.tensorboard import RunTensorBoard

from hvdspark.data.shardcache import CacheRoom
from hvdspark.errors import StoreError
from hvdspark.launch import gpus
from hvdspark.plan import FitPlan, ModelTensor, ShardPlan, TrainResult
from hvdspark.runs import run_folder
from hvdspark.store import Store
from hvdspark.worker import imports, pulse
from hvdspark.worker.checkpoint import Checkpoints
from hvdspark.worker.reporter import Reporter
from hvdspark.worker.session import Session, context_from_environment, horovod_session
from hvdspark.worker.timeline import timeline_in

logger = logging.getLogger(__name__)

# Steps after which all ranks look together at what they met, where no callback wants to see each of them. As many are
# taken in one call of the compiled function, at most.
STEPS_TOGETHER = 32

# Validation has no such steps: a call may take all that a chunk holds.
_ANY_STEPS = 1 << 30


def train(plan: FitPlan, spec: KerasSpec) -> TrainResult | None:
    """Train in this rank, together with all others.

    Returns
    -------
    TrainResult or None
        On rank 0 the history and where the model is, on the others ``None``.
    """
    _choose_devices(spec.use_gpu)
    store = Store.from_ref(plan.store).within(run_folder(plan.run_id))
    with timeline_in(store, plan.run_id) if spec.timeline else nullcontext(), horovod_session(hvd) as session:
        return _Training(plan, spec, session, store).run()


def _choose_devices(use_gpu: bool) -> None:
    """Give the rank the one GPU that is its own, or none; must come before anything else touches TensorFlow."""
    visible = devices.visible_gpus() if use_gpu else []
    if visible:
        devices.use(visible[gpus.position(len(visible), context_from_environment(), os.environ)])
        return
    tf.config.set_visible_devices([], "GPU")
    if use_gpu and gpus.OWN in os.environ:
        logger.warning(
            "training on the CPU: Spark gave this rank a GPU, but TensorFlow %s sees none; it needs NVIDIA's driver and"
            " the package tensorflow[and-cuda]",
            tf.__version__,
        )


class _Training:
    """The state of one rank's training."""

    def __init__(self, plan: FitPlan, spec: KerasSpec, session: Session, store: Store) -> None:
        self._plan = plan
        self._spec = spec
        self._session = session
        self._phases = {"import": imports.waited_s()}
        self._epoch = "no epoch yet"
        self._store = store
        self._checkpoints = Checkpoints(store, plan.run_id, codec.SUFFIX, spec.best_of)
        self._clock = StepClock()
        self._pace, self._val_pace = Pace(STEPS_TOGETHER), Pace(_ANY_STEPS)
        self._reporter: Reporter | None = None
        self._serialize_final = self._serialize
        self._unkept: Place | None = None
        room = CacheRoom(session.context.local_size)
        passes = -(-plan.epochs * plan.steps_per_epoch // plan.train.steps)
        self._batches = self._open(plan.train, room, passes, shuffle=plan.shuffle)
        self._val_batches = self._open(plan.val, room, plan.epochs, shuffle=False) if plan.val is not None else None

    def run(self) -> TrainResult | None:
        pulse.moved_on("preparing the model")
        with self._timed("prepare"):
            self._prepare()
        with self._timed("train"), self._reporter or nullcontext():
            self._epochs()
            wait_share = self._longest_wait()
        pulse.moved_on("publishing the model")
        with self._timed("publish"):
            path = self._publish()
        if not self._session.is_first:
            return None
        inputs, outputs = codec.describe(self._model)
        return TrainResult(
            history=dict(self._history.history),
            model_path=path,
            phases=self._phases,
            rows_per_s=self._clock.rows_per_s,
            data_wait_share=wait_share,
            inputs=inputs or (),
            outputs=outputs or self._outputs(),
            epochs=tuple(self._history.records),
        )

    def _open(self, shards: ShardPlan, room: CacheRoom, passes: int, *, shuffle: bool) -> Batches:
        plan, rank = self._plan, self._session.context.rank
        return Batches(plan, shards, rank, shuffle=shuffle, workers=plan.reader_workers, passes=passes, room=room)

    def _longest_wait(self) -> float:
        """Return the share of time that steps waited for rows, of the rank that waited longest."""
        return float(self._session.gather(self._clock.wait_share, "hvdspark_data_wait").max())

    def _prepare(self) -> None:
        """Make the model, the same on every rank, and the compiled functions."""
        plan, spec = self._plan, self._spec
        keras.utils.set_random_seed(plan.seed)
        # The bytes come from the user's own driver through Spark's channel, Lambda layers included.
        self._model = codec.model_from_bytes(spec.model, spec.custom_objects, safe_mode=False)
        self._build()
        _compile(self._model, spec)
        optimizer = self._model.optimizer
        if spec.learning_rate is not None:
            optimizer.learning_rate = spec.learning_rate
        size = self._session.context.size
        self._rate = LearningRateScale(optimizer, size if spec.scale_learning_rate else 1)
        variables = self._model.trainable_variables
        if not optimizer.built:
            optimizer.build(variables)
        self._agreement = Agreement(self._session)
        self._agree([*self._model.weights, *optimizer.variables])
        allreduce = choose_allreduce(spec.allreduce, self._session, variables, spec.compression)
        self._session.settle()
        self._guard = FiniteGuard(spec.on_nan, self._session, optimizer)
        self._reducer = GradientReducer(allreduce, spec.passes_per_step, self._guard, self._agreement)
        self._reducer.attach(optimizer, variables)
        self._diverge()
        self._pack = packer(self._model, plan.batch)
        self._facts = self._batches.facts(spec.passes_per_step)
        self._train_steps = TrainSteps(
            self._model,
            self._batches,
            self._pack,
            self._reducer,
            self._guard,
            self._agreement,
            idles=plan.train.has_idle_steps,
            accumulates=spec.passes_per_step > 1,
        )
        if self._val_batches is not None:
            self._val_steps = ValidationSteps(self._model, self._val_batches, self._pack)
        self._journal = Journal(
            plan, self._session, self._model, allreduce, self._clock, self._rows_of, spec.passes_per_step
        )
        if self._session.is_first:
            self._reporter = Reporter(self._store, plan.run_id, self._journal.progress)

    def _agree(self, variables: Sequence[Any]) -> None:
        """Give all ranks the first one's variables, should any differ: they come from one file and one seed."""
        digest = hashlib.blake2b(digest_size=6)  # a float64 holds it exactly
        for variable in variables:
            digest.update(np.ascontiguousarray(variable).tobytes())
        found = self._session.gather(int.from_bytes(digest.digest(), "big"), "hvdspark_digests")
        if (found != found[0]).any():
            self._agreement.check("weights", [f"{variable.path} {describe(variable)}" for variable in variables])
            hvd.broadcast_variables([variable.value for variable in variables], root_rank=0)

    def _diverge(self) -> None:
        """Let ranks differ from here on where chance is wanted, as in dropout and in the user's own code."""
        lot = self._plan.train.lot_of(self._session.context.rank)
        keras.utils.set_random_seed((self._plan.seed + lot) % 2**32)
        for variable in self._model.variables:
            # Keras keeps the state of a layer's generator as (seed, counter), a variable that is no weight.
            if variable.path.endswith("seed_generator_state"):
                variable.assign(np.asarray(variable) + np.array([lot, 0], dtype=variable.dtype))

    def _build(self) -> None:
        """Build a model that learns its shapes from the first rows."""
        if self._model.built:
            return
        pack = packer(self._model, self._plan.batch)
        self._model(pack(*(tf.constant(tensor) for tensor in self._batches.sample()))[0])

    def _outputs(self) -> tuple[ModelTensor, ...]:
        """Describe the outputs of a model that does not state them, by what it makes of one row."""
        x = self._pack(*(tf.constant(tensor) for tensor in self._batches.sample()))[0]
        flat = keras.tree.flatten(self._model(x, training=False))
        return tuple(
            ModelTensor(f"output_{index}", tuple(tensor.shape[1:]), str(tensor.dtype.name))
            for index, tensor in enumerate(flat)
        )

    def _rows_of(self, first: int, stop: int) -> np.ndarray:
        """Return the rows of all ranks by step."""
        return self._facts.of(first, stop)[1]

    def _event_files(self) -> list[RunTensorBoard]:
        """Return what writes TensorBoard's event files, on the first rank and where they are wanted."""
        if self._reporter is None or not self._spec.tensorboard:
            return []
        return [RunTensorBoard(self._store, self._plan.run_id, self._reporter)]

    def _epochs(self) -> None:
        """Run all epochs that are left."""
        plan, session = self._plan, self._session
        self._history = EpochHistory()
        # The history last, as in Keras: it records what the others add to the logs.
        own = [*chosen(self._spec.callbacks, is_first=session.is_first), *self._event_files(), self._history]
        # Together: ranks that take another number of steps at a time would not stop at the same one.
        self._watches_steps = session.any(watch_steps(own), "hvdspark_watch_steps")
        self._watches_losses = watch_losses(own)
        # Validation has no step in which ranks meet.
        self._watches_validation = watch_validation_steps(own)
        callbacks = callback_list(own, self._model, plan.epochs, plan.steps_per_epoch)
        # Where event files go is not for a checkpoint to say.
        kept = [each for each in callbacks.callbacks if not isinstance(each, RunTensorBoard)]
        # Together, as states are kept: whether the model is published as the last epoch leaves it.
        changes = act_at_end(kept) or changes_at_end(self._model.optimizer)
        self._ends_plainly = not session.any(changes, "hvdspark_changes_at_end")
        self._model.stop_training = False
        callbacks.on_train_begin()
        snapshot = Snapshot(self._model, kept, [*self._reducer.variables, *self._guard.variables])
        self._states = States(plan, self._spec, session, snapshot, self._rate, self._checkpoints)
        if self._states.exist:
            build_metrics(self._model, self._batches, self._pack)
        place = self._states.resume()
        steps = plan.steps_per_epoch
        passes = ENDLESS if plan.train_steps_per_epoch else plan.epochs
        feed = StepFeed(self._batches, passes, fill=True, first=place.step)
        logs = dict(place.logs)
        for epoch in range(place.step // steps, plan.epochs if not place.stopped else 0):
            first = epoch * steps
            self._epoch = f"epoch {epoch + 1}"
            pulse.moved_on(f"{self._epoch}, beginning")
            self._journal.begin(epoch, max(place.step - first, 0))
            anew = place.step <= first
            if anew:
                self._model.reset_metrics()
                callbacks.on_epoch_begin(epoch)
            self._guard.begin_epoch(anew=anew)
            self._train_steps.refresh()
            rows = self._run_steps(feed, callbacks, epoch, max(place.step - first, 0))
            if not len(rows):  # the training ended with the epoch before
                break
            own_loss = current_metrics(self._model).get("loss", 0.0)
            logs = global_metrics(self._model, session, int(rows.sum()), "hvdspark_train_metrics")
            self._journal.trained(int(self._rows_of(max(first, place.step), first + len(rows)).sum(dtype=np.int64)))
            pulse.moved_on(f"{self._epoch}, after its last step")
            self._average_statistics()
            if self._val_batches is not None:
                with self._journal.validating():
                    logs |= {f"val_{name}": value for name, value in self._validate(callbacks).items()}
            logs |= self._guard.end_epoch(epoch, steps, logs, own_loss)
            self._model.stop_training |= self._guard.ended
            pulse.moved_on(f"{self._epoch}, in callbacks at its end")
            callbacks.on_epoch_end(epoch, logs)
            self._note_epoch()
            pulse.moved_on(f"{self._epoch}, keeping what was trained")
            if session.is_first:
                logger.info("epoch %d/%d: %s", epoch + 1, plan.epochs, _show(logs))
            stopped = session.any(bool(self._model.stop_training), "hvdspark_stop")
            self._keep(Place(first + steps, logs, stopped), is_final=stopped or epoch + 1 == plan.epochs)
            if stopped:
                self._model.stop_training = True
                break
        self._finish(callbacks, logs)

    def _note_epoch(self) -> None:
        """Keep what is known of the epoch that has ended, and on the first rank have it written."""
        records = self._history.records
        records.append(self._journal.record(self._history.last).to_plain())
        if self._reporter is not None:
            self._reporter.history(records)

    def _keep(self, place: Place, *, is_final: bool) -> None:
        """Keep what was trained up to the end of an epoch."""
        publishes_next = is_final and self._ends_plainly
        if publishes_next:
            self._serialize_final = functools.cache(self._serialize)
        if self._session.is_first:
            self._checkpoints.save(place.logs, self._serialize_final, is_final=is_final)
        if publishes_next:
            # The model itself takes the place of a state.
            self._unkept = place
        else:
            self._states.keep(place)

    def _finish(self, callbacks: Any, logs: Mapping[str, float]) -> None:
        """Let the optimizer and the callbacks have their last word on the weights, as restoring the best ones is."""
        self._model.optimizer.finalize_variable_values(self._model.trainable_variables)
        callbacks.on_train_end(logs)

    def _publish(self) -> str:
        """Have the first rank make the model the run's result; returns where that is, on this rank."""
        path, error = "", None
        if self._session.is_first:
            try:
                path = self._checkpoints.publish(self._serialize_final)
            except StoreError as exc:
                error = exc
        if self._unkept is not None and self._session.any(error is not None, "hvdspark_unpublished"):
            self._states.keep(self._unkept)
        if error is not None:
            raise error
        if self._session.is_first:
            self._states.clear()
        return path

    def _average_statistics(self) -> None:
        """Average what layers keep of the rows they saw, such as batch normalization's means, over the ranks."""
        if self._session.context.size == 1:
            return
        kept = [v for v in self._model.weights if not v.trainable and v.dtype.startswith("float")]
        states = [np.asarray(variable, dtype=np.float64).reshape(-1) for variable in kept]
        if not states:
            return
        sums = self._session.sum(np.concatenate(states), "hvdspark_statistics")
        start = 0
        for variable, state in zip(kept, states, strict=True):
            mean = sums[start : start + len(state)] / self._session.context.size
            variable.assign(mean.reshape(variable.shape))
            start += len(state)

    def _run_steps(self, feed: StepFeed, callbacks: Any, epoch: int, step: int) -> np.ndarray:
        """Take the steps of one epoch from some step on; returns the rows of this rank by step, as far as it came."""
        interval, steps = self._spec.checkpoint_steps, self._plan.steps_per_epoch
        first = epoch * steps
        while step < steps:
            stop = min(step + (1 if self._watches_steps else STEPS_TOGETHER), steps)
            if interval:
                stop = min(stop, step + interval - (first + step) % interval)
            if self._watches_steps:
                callbacks.on_train_batch_begin(step)
            self._take_steps(feed, first, step, stop)
            self._guard.look(epoch, step, steps)
            if self._guard.ended:
                break
            step = stop
            if self._watches_steps or self._watches_losses:
                callbacks.on_train_batch_end(step - 1, current_metrics(self._model))
            if interval and (first + step) % interval == 0 and step < steps:
                self._guard.check_weights(self._model.trainable_variables, epoch, step)
                self._states.keep(Place(first + step))
        self._guard.check_weights(self._model.trainable_variables, epoch, step)
        rows, _, apply = self._facts.of(first, first + steps)
        return self._guard.counted(rows, apply, epoch)

    def _take_steps(self, feed: StepFeed, first: int, start: int, stop: int) -> None:
        """Take some steps of the epoch that has this first step.

        Ranks may take them in different calls: in what is their own pace, and as their chunks end.
        """
        step = start
        while step < stop:
            here = f"{self._epoch}, step {step + 1}"
            pulse.moved_on(f"{here}, waiting for rows")
            portion = feed.take(min(self._pace.steps, stop - step), self._clock.waiting())
            pulse.moved_on(f"{here}, computing")
            self._journal.call(step, portion.count)
            facts = self._facts.of(first + step, first + step + portion.count)
            with self._pace.call(portion.count):
                self._train_steps.take(portion, step - start, *facts)
            step += portion.count
            self._journal.called(step)
            pulse.moved_on(f"{here}, after it")

    def _validate(self, callbacks: Any) -> dict[str, float]:
        """Evaluate on the validation rows of all ranks."""
        shards = self._plan.val
        assert shards is not None
        assert self._val_batches is not None
        limit = self._plan.validation_steps_per_epoch
        steps = self._val_batches.own_steps if limit is None else min(limit, self._val_batches.own_steps)
        self._model.reset_metrics()
        callbacks.on_test_begin()
        feed = StepFeed(self._val_batches, 1, fill=False)
        done = 0
        while done < steps:
            pulse.moved_on(f"{self._epoch}, validating, {steps - done} steps left")
            portion = feed.take(1 if self._watches_validation else min(self._val_pace.steps, steps - done))
            if self._watches_validation:
                callbacks.on_test_batch_begin(done)
            with self._val_pace.call(portion.count):
                self._val_steps.take(portion)
            done += portion.count
            if self._watches_validation:
                callbacks.on_test_batch_end(done - 1, current_metrics(self._model))
        rank = self._session.context.rank
        rows = sum(shards.rows_at(rank, step) for step in range(steps))
        logs = global_metrics(self._model, self._session, rows, "hvdspark_val_metrics")
        callbacks.on_test_end(logs)
        return logs

    def _serialize(self) -> bytes:
        with self._rate.taken_out():
            return codec.model_to_bytes(self._model)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._phases[phase] = time.perf_counter() - start


def _compile(model: keras.Model, spec: KerasSpec) -> None:
    """Compile as the estimator says, else as the model was."""
    config = {name: codec.from_config(value, spec.custom_objects) for name, value in spec.compiling.items()}
    if config.get("loss") is None:
        return
    model.compile(
        optimizer=config.get("optimizer") or getattr(model, "optimizer", None) or "rmsprop",
        loss=config["loss"],
        loss_weights=config.get("loss_weights"),
        metrics=config.get("metrics"),
        # Horovod's collectives cannot be part of an XLA program here.
        jit_compile=False,
        run_eagerly=model.run_eagerly,
    )


def _show(logs: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in logs.items())
