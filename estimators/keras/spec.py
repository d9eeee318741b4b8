"""What travels to the ranks: the model and how to train it. Imports no framework, as the driver needs none for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hvdspark.worker.checkpoint import BestOf


@dataclass(frozen=True)
class KerasSpec:
    """The model and how to train it, as they travel to the ranks through Spark's own channel.

    Parameters
    ----------
    model
        A ``.keras`` file.
    compiling
        Configurations of ``optimizer``, ``loss``, ``metrics`` and ``loss_weights`` (see
        :func:`~hvdspark.estimators.keras.codec.to_config`); without a loss the model's own compilation stands.
    custom_objects
        The user's own classes and functions.
    callbacks
        Keras callbacks.
    learning_rate
        Replaces the optimizer's, where given.
    scale_learning_rate
        Whether to multiply it by the number of ranks.
    allreduce, compression
        See :func:`~hvdspark.estimators.keras.allreduce.choose_allreduce`.
    passes_per_step
        See :class:`~hvdspark.estimators.keras.optimizer.GradientReducer`.
    best_of
        Which epoch's model is kept.
    checkpoint_steps
        Steps after which the state of the training is kept, besides the end of every epoch; ``None`` for then only.
    keep_checkpoints
        How many of these states are kept.
    on_nan
        See :class:`~hvdspark.estimators.keras.finite.FiniteGuard`.
    use_gpu
        Whether to use the GPU of the local rank, where there is one.
    tensorboard, timeline
        Whether to write TensorBoard's event files, and Horovod's timeline.
    """

    model: bytes = field(repr=False)
    compiling: Mapping[str, Any]
    custom_objects: Mapping[str, Any]
    callbacks: tuple[Any, ...]
    learning_rate: float | None
    scale_learning_rate: bool
    allreduce: str
    compression: str
    passes_per_step: int
    best_of: BestOf | None
    use_gpu: bool
    checkpoint_steps: int | None = None
    keep_checkpoints: int = 2
    on_nan: str = "fail"
    tensorboard: bool = False
    timeline: bool = False
