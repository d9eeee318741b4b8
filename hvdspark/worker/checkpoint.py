"""Which epoch's model is kept, and how it gets into the run's folder."""

from __future__ import annotations

import contextlib
import logging
import math
import posixpath
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hvdspark.errors import ParamError, StoreError, closest
from hvdspark.metrics import Mode, improves, rises
from hvdspark.runs import MODEL, run_folder
from hvdspark.store import Store

logger = logging.getLogger(__name__)

# The folder in a run's, and its models without their suffix.
CHECKPOINTS = "checkpoints"
LAST, BEST = "last", "best"


@dataclass(frozen=True)
class BestOf:
    """Keep the epoch with the best value of a metric instead of the last one.

    Parameters
    ----------
    monitor
        Name in the history, such as ``"val_loss"``.
    mode
        Whether less or more is better; ``"auto"`` takes accuracies, AUC and the like as rising, losses and errors and
        all else as falling.
    """

    monitor: str = "val_loss"
    mode: Mode = "auto"

    @property
    def rising(self) -> bool:
        """Whether more is better."""
        return rises(self.monitor, self.mode)


class Checkpoints:
    """The models of a run: while it lasts that of the last epoch, and the best so far where that is wanted.

    Only rank 0 has one of these. A model that cannot be written, as on a full disk, is kept in memory and tried again
    with the next one: the training goes on, and what is published at the end is never an older model.

    Parameters
    ----------
    store, run_id
        Where they go: ``runs/<run_id>/checkpoints``.
    suffix
        File suffix of the framework's format.
    best_of
        Which epoch is kept; ``None`` keeps the last.
    """

    def __init__(self, store: Store, run_id: str, suffix: str, best_of: BestOf | None = None) -> None:
        self._store = store
        self._run_id = run_id
        self._folder = run_folder(run_id)
        self._suffix = suffix
        self._best_of = best_of
        self._best_value = math.nan
        self._unwritten: dict[str, bytes] = {}
        self._final_best: bytes | None = None

    @property
    def is_behind(self) -> bool:
        """Whether the best model is not in the Store yet, so that another attempt would not find it."""
        return BEST in self._unwritten

    @property
    def best_value(self) -> float:
        """The metric's best value so far; NaN before there is one. Set where another attempt goes on."""
        return self._best_value

    @best_value.setter
    def best_value(self, value: float) -> None:
        self._best_value = value

    def save(self, logs: Mapping[str, float], serialize: Callable[[], bytes], *, is_final: bool = False) -> None:
        """Keep the model of an epoch that has just ended.

        Parameters
        ----------
        logs
            The epoch's metrics.
        serialize
            Gives the model's bytes.
        is_final
            Whether the training ends with it: then it is kept only as the best, and else left to :meth:`publish`.

        Raises
        ------
        ParamError
            When the metric to go by is not among them (naming those that are).
        """
        is_best = self._best_of is not None and self._improves(logs)
        if is_best or not is_final:
            data = serialize()
            if is_final:
                self._final_best = data
            else:
                self._write(LAST, data)
            if is_best:
                self._write(BEST, data)
        if self.is_behind and not is_best:
            self._write(BEST, self._unwritten[BEST])

    def publish(self, serialize: Callable[[], bytes]) -> str:
        """Make the trained model, or that of the best epoch, the run's result.

        Parameters
        ----------
        serialize
            Gives the bytes of the trained model.

        Returns
        -------
        str
            Its path, relative to the Store.

        Raises
        ------
        StoreError
            When it cannot be written.
        """
        target = posixpath.join(self._folder, MODEL + self._suffix)
        data = serialize()
        if self._best_of is not None:
            self._write(LAST, data)
        try:
            self._store.publish_bytes(data if self._best_of is None else self._best(), target)
        except StoreError as exc:
            raise StoreError(
                f"{exc}. The model is trained, but not in the Store: when that has room and can be reached again, fit"
                f" with run_id='{self._run_id}' goes on from the last checkpoint",
                url=exc.url,
            ) from exc
        if self._best_of is None:
            # That of an epoch before.
            with contextlib.suppress(StoreError):
                self._store.delete(self._path(LAST))
        return target

    def _best(self) -> bytes:
        data = self._final_best or self._unwritten.get(BEST)
        return self._store.read_bytes(self._path(BEST)) if data is None else data

    def _write(self, name: str, data: bytes) -> None:
        try:
            self._store.publish_bytes(data, self._path(name))
        except StoreError as exc:
            self._unwritten[name] = data
            logger.warning("the %s model is kept in memory until it can be written: %s", name, exc)
        else:
            self._unwritten.pop(name, None)

    def _path(self, name: str) -> str:
        return posixpath.join(self._folder, CHECKPOINTS, name + self._suffix)

    def _improves(self, logs: Mapping[str, float]) -> bool:
        assert self._best_of is not None
        monitor = self._best_of.monitor
        if monitor not in logs:
            raise ParamError(
                f"checkpoint_callback monitors '{monitor}', which this fit does not have.{closest(monitor, logs)} It"
                f" has: {', '.join(logs)}",
                param="checkpoint_callback",
            )
        value = float(logs[monitor])
        # The first value is always kept, and any number is better than NaN.
        if improves(value, self._best_value, rising=self._best_of.rising):
            self._best_value = value
            return True
        return False
