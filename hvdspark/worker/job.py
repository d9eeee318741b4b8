"""What a training process is asked to do."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Job:
    """A call to make in every training process.

    Parameters
    ----------
    target
        The function, or its address as ``"package.module:function"``; the address keeps what the module needs out of
        the process that only passes the job on.
    args, kwargs
        Its arguments.
    """

    target: Callable[..., Any] | str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def modules(self) -> tuple[str, ...]:
        """What to import ahead of the call: the module of a target that is given by address."""
        return (self.target.partition(":")[0],) if isinstance(self.target, str) else ()

    def after(self, *first: Any) -> Job:
        """Return the same call with other arguments before its own."""
        return replace(self, args=(*first, *self.args))

    def call(self) -> Any:
        """Make the call."""
        target = self.target
        if isinstance(target, str):
            module, _, name = target.partition(":")
            target = getattr(importlib.import_module(module), name)
        return target(*self.args, **self.kwargs)
