"""How many tasks a cluster can run at once: asked before a launch, because Spark itself would wait in silence."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any

from hvdspark.errors import LaunchError, NotEnoughSlotsError, ParamError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

logger = logging.getLogger(__name__)

_POLL_S = 0.5


def check_slots(spark: SparkSession, num_proc: int, timeout_s: float) -> None:
    """Check that the cluster can run that many tasks at once; wait for executors that are still coming.

    Raises
    ------
    ParamError
        When ``num_proc`` is not a positive number.
    NotEnoughSlotsError
        When it cannot. Spark itself would try for ten silent minutes.
    LaunchError
        With dynamic allocation, which Spark refuses for barrier stages.
    """
    if num_proc < 1:
        raise ParamError(f"num_proc={num_proc}: give at least one rank", param="num_proc")
    conf = spark.sparkContext.getConf()
    if conf.get("spark.dynamicAllocation.enabled", "false") == "true":
        raise LaunchError(
            "spark.dynamicAllocation.enabled is true, and Spark runs no barrier stage with it. Submit the job with"
            " --conf spark.dynamicAllocation.enabled=false and a fixed number of executors."
        )
    available = await_slots(spark, num_proc, timeout_s)
    if available < num_proc:
        raise NotEnoughSlotsError(
            f"needs {num_proc} slots, the cluster can run {available} at once. Lower num_proc, or give the job"
            f" {_remedy(spark)}.",
            needed=num_proc,
            available=available,
        )


def await_slots(spark: SparkSession, wanted: int, timeout_s: float) -> int:
    """Wait for executors that are still coming, until there are so many slots; returns how many there are then."""
    deadline = time.monotonic() + (0.0 if _is_complete(spark) else timeout_s)
    announced = False
    while (available := count_slots(spark)) < wanted and time.monotonic() < deadline:
        if not announced:
            logger.info("waiting up to %g s for %d slots, %d are there", timeout_s, wanted, available)
            announced = True
        time.sleep(_POLL_S)
    return available


def _remedy(spark: SparkSession) -> str:
    """Say what the job needs more of."""
    scala_context: Any = spark.sparkContext._jsc.sc()
    profile = scala_context.resourceProfileManager().defaultResourceProfile()
    limit = str(profile.limitingResource(scala_context.conf()))
    if limit in ("", "cpus"):
        return "more executors or cores (spark.executor.instances, spark.executor.cores, spark.task.cpus)"
    settings = [f"spark.{who}.resource.{limit}.amount" for who in ("task", "executor")]
    found = ", ".join(f"{name}={spark.sparkContext.getConf().get(name)}" for name in settings)
    device = "GPUs" if limit == "gpu" else f"resources of the kind '{limit}'"
    return f"more executors or {device}, which are what runs out ({found})"


def count_slots(spark: SparkSession) -> int:
    """Return how many tasks the cluster can run at the same time."""
    scala_context: Any = spark.sparkContext._jsc.sc()
    profile = scala_context.resourceProfileManager().defaultResourceProfile()
    return int(scala_context.maxNumConcurrentTasks(profile))


def _is_complete(spark: SparkSession) -> bool:
    """Whether all executors that can come have come; local modes tell, clusters do not."""
    master = spark.sparkContext.master or ""
    if master.startswith("local-cluster["):
        expected = int(master.removeprefix("local-cluster[").split(",")[0])
        running: Any = spark.sparkContext._jsc.sc().statusTracker().getExecutorInfos()
        return len(running) > expected  # the driver counts as one
    return master.startswith("local")
