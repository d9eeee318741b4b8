"""TensorBoard's event files in the run's folder, as Keras writes them: ``runs/<run_id>/tensorboard``."""

from __future__ import annotations

import logging
import posixpath
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from hvdspark.errors import StoreError
from hvdspark.layout import TENSORBOARD
from hvdspark.runs import run_folder
from hvdspark.store import Store
from hvdspark.worker.reporter import Reporter

logger = logging.getLogger(__name__)

_Callback = keras.callbacks.Callback


class RunTensorBoard(keras.callbacks.TensorBoard):  # type: ignore[misc]
    """Keras' own callback, for the run's folder; what it cannot write is logged once, and the training goes on.

    TensorFlow writes to local files only. For another Store they are written beside it, and brought there at the end of
    every epoch.

    Parameters
    ----------
    store, run_id
        Where they go.
    reporter
        Brings files to a Store that is not local.
    """

    # Keras' hooks at every step do nothing unless the profiler is on; without them a call may take many steps.
    on_train_batch_begin = _Callback.on_train_batch_begin
    on_train_batch_end = _Callback.on_train_batch_end

    def __init__(self, store: Store, run_id: str, reporter: Reporter) -> None:
        self._store = store
        self._target = posixpath.join(run_folder(run_id), TENSORBOARD)
        self._reporter = reporter
        self._failed = False
        self._sent: dict[str, int] = {}
        if store.is_local:
            self._attempt(lambda: store.make_folder(self._target))
            self._place = Path(store.path(self._target))
        else:
            # The launcher gives a rank a folder for temporary files, which goes with it.
            self._place = Path(tempfile.mkdtemp(prefix="tensorboard-"))
        super().__init__(str(self._place))

    def set_model(self, model: Any) -> None:
        """Take the model, and write its structure."""
        self._attempt(lambda: super(RunTensorBoard, self).set_model(model))

    def on_train_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Open the training's file."""
        self._attempt(lambda: super(RunTensorBoard, self).on_train_begin(logs))

    def on_test_begin(self, logs: Mapping[str, Any] | None = None) -> None:
        """Open the validation's file."""
        self._attempt(lambda: super(RunTensorBoard, self).on_test_begin(logs))

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Write the metrics of an epoch."""
        self._attempt(lambda: self._write(epoch, logs))

    def on_test_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Write the validation's metrics."""
        self._attempt(lambda: super(RunTensorBoard, self).on_test_end(logs))

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Close the files."""
        self._attempt(lambda: super(RunTensorBoard, self).on_train_end(logs))
        self._bring()

    def _write(self, epoch: int, logs: Mapping[str, Any] | None) -> None:
        super().on_epoch_end(epoch, logs)
        for writer in self._writers.values():
            writer.flush()
        self._bring()

    def _bring(self) -> None:
        if not self._store.is_local:
            self._reporter.soon("TensorBoard's files", self._publish)

    def _publish(self) -> None:
        """Publish the files that have grown."""
        for path in sorted(self._place.rglob("*")):
            name = path.relative_to(self._place).as_posix()
            if path.is_file() and self._sent.get(name) != (size := path.stat().st_size):
                self._store.publish_file(path, self._target, name)
                self._sent[name] = size

    def _attempt(self, act: Callable[[], Any]) -> None:
        if self._failed:
            return
        try:
            act()
        except (OSError, StoreError, tf.errors.OpError) as exc:
            self._failed = True
            logger.warning("no more event files for TensorBoard: %s", exc)
