"""Hands out the steps of a chunk, as many at a time as the caller wants."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import tensorflow as tf
from hvdspark.estimators.keras.batches import Batches


@dataclass(frozen=True)
class Portion:
    """Steps that lie side by side in one chunk.

    Parameters
    ----------
    chunk
        Flat tensors, as :meth:`Batches.chunks` gives them.
    start
        The first of the steps, counted from the chunk's beginning.
    count
        How many there are.
    """

    chunk: tuple[tf.Tensor, ...]
    start: int
    count: int


class StepFeed:
    """Takes steps from chunks; what is left of a chunk waits for the next call.

    So a call of the compiled function never crosses the end of an epoch, wherever chunks and passes end.

    Parameters
    ----------
    batches
        Whose rows.
    passes
        How often they come.
    fill
        Whether there are steps too in which this rank has no row.
    first
        The step to begin with.
    """

    def __init__(self, batches: Batches, passes: int, *, fill: bool, first: int = 0) -> None:
        self._batches = batches
        self._chunks = iter(batches.chunks(passes, fill=fill, first=first))
        self._chunk: Any = None
        self._taken = self._held = 0

    def take(self, most: int, waiting: AbstractContextManager[None] | None = None) -> Portion:
        """Take the next steps.

        Parameters
        ----------
        most
            How many at most; fewer come where the chunk ends.
        waiting
            Entered while the next chunk is waited for.
        """
        if self._taken == self._held:
            # What was used up goes before the next one comes.
            self._chunk = None
            with waiting or nullcontext():
                self._chunk = self._next()
            self._taken, self._held = 0, self._batches.steps_in(self._chunk)
        portion = Portion(self._chunk, self._taken, min(most, self._held - self._taken))
        self._taken += portion.count
        return portion

    def _next(self) -> Any:
        try:
            return next(self._chunks)
        except tf.errors.OpError:
            if self._batches.error is not None:
                raise self._batches.error from None
            raise
