"""How ranks are started: what a user may choose, and what follows from it before the tasks have met."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hvdspark.errors import ParamError, closest
from hvdspark.launch import devices
from hvdspark.launch.answers import LEAST_STALL_S
from hvdspark.launch.control import CONTROLLERS
from hvdspark.launch.fabric import Rdma
from hvdspark.launch.process import Recipe, recipe_of
from hvdspark.plan import RankContext, StoreRef
from hvdspark.store import Store

# Horovod's own timeouts come after ours, which know who is to blame.
_GLOO_TIMEOUT, _AFTER_STALL_S, _NEVER_S = "HOROVOD_GLOO_TIMEOUT_SECONDS", 30, 7 * 86400


@dataclass(frozen=True)
class LaunchOptions:
    """How ranks are started.

    Parameters
    ----------
    controller
        The control plane: ``"gloo"``, ``"mpi"``, or ``"auto"``, see :func:`hvdspark.launch.control.choose`.
    nics
        Network interfaces the ranks may use; empty chooses by Spark's host names.
    rdma
        Whether to use RDMA devices, see :func:`hvdspark.launch.fabric.fabric_environment`.
    env
        Environment variables for the training processes.
    start_timeout_s
        Seconds within which all training processes must have begun.
    stall_timeout_s
        Seconds after which a rank that gives no sign of life, or does not move on, is given up; 0 for never.
    slots_timeout_s
        Seconds to wait for executors that are still registering.
    logs
        Folder for the ranks' logs, relative to ``store``.
    preload
        Modules that the ranks will need, imported while the tasks are still meeting.
    warm_pool
        Whether processes that have done these imports are kept on the executors for the next job.
    allow_insecure_transport
        Whether the ranks may talk unprotected where Spark protects its own connections.
    """

    controller: str = "gloo"
    nics: tuple[str, ...] = ()
    rdma: Rdma = "auto"
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    start_timeout_s: float = 120.0
    stall_timeout_s: float = 600.0
    slots_timeout_s: float = 30.0
    store: StoreRef | None = None
    logs: str | None = None
    preload: tuple[str, ...] = ()
    warm_pool: bool = True
    allow_insecure_transport: bool = False

    def __post_init__(self) -> None:
        if self.controller not in CONTROLLERS:
            raise ParamError(
                f"controller='{self.controller}' is not known.{closest(self.controller, CONTROLLERS)} This version"
                f" has: {', '.join(CONTROLLERS)}",
                param="controller",
            )
        if self.stall_timeout_s and not self.stall_timeout_s >= LEAST_STALL_S:
            raise ParamError(
                f"stall_timeout_s={self.stall_timeout_s:g}: give at least {LEAST_STALL_S:g}, or 0 to wait for ever",
                param="stall_timeout_s",
            )

    @property
    def logs_url(self) -> str | None:
        """Where the ranks' logs are, for people."""
        if self.store is None or self.logs is None:
            return None
        return Store.from_ref(self.store).url_of(self.logs)

    def variables(self, context: RankContext) -> dict[str, str]:
        """Return the environment variables of a rank that are known before the tasks have met."""
        gloo_timeout_s = int(self.stall_timeout_s or _NEVER_S) + _AFTER_STALL_S
        return {**_defaults(context), _GLOO_TIMEOUT: str(gloo_timeout_s), **self.env}

    def recipe(self, context: RankContext) -> Recipe:
        """Return what a rank's process is before it has work."""
        # Horovod reads its variables when it starts, all others may be read by an import.
        early = {name: value for name, value in self.variables(context).items() if not name.startswith("HOROVOD_")}
        return recipe_of(early, self.preload)


def _defaults(context: RankContext) -> dict[str, str]:
    """Return settings that a user may override with ``env``."""
    threads = str(devices.threads_per_rank(context.local_size))
    return {
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TF_NUM_INTRAOP_THREADS": threads,
        # More threads than cores only take turns; on small models that cost a sixth of the time.
        "TF_NUM_INTEROP_THREADS": threads,
        "OMP_NUM_THREADS": threads,
        "KERAS_BACKEND": "tensorflow",
    }
