"""``run_barrier``: one barrier stage in which every task runs one rank.

Spark starts all tasks of the stage together or none. They exchange where they are by ``allGather`` at the start, and
never wait for each other with it afterwards: a task that waits for a dead peer there can take its executor down.
Failures travel as data, because Spark would retry an exception blindly; the driver decides what they mean.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import IO, TYPE_CHECKING, Any

import pyarrow as pa

from hvdspark.errors import (
    HvdSparkError,
    LaunchError,
    LaunchTimeoutError,
    NotEnoughSlotsError,
    ParamError,
    RendezvousError,
    WorkerFailedError,
    closest,
)
from hvdspark.launch import devices, topology
from hvdspark.launch.child import Failure, Outcome, run_child
from hvdspark.launch.gloo import RendezvousServer, gloo_environment
from hvdspark.plan import RankContext, StoreRef
from hvdspark.store import Store

if TYPE_CHECKING:
    from pyspark import BarrierTaskContext
    from pyspark.sql import SparkSession

logger = logging.getLogger(__name__)

CONTROLLERS = ("gloo",)

_SCHEMA = "rank long, result binary, failure string"
_POLL_S = 0.5


@dataclass(frozen=True)
class LaunchOptions:
    """How ranks are started.

    Parameters
    ----------
    controller
        The control plane: ``"gloo"``.
    nics
        Network interfaces the ranks may use; empty chooses by Spark's host names.
    env
        Environment variables for the training processes.
    start_timeout_s
        Seconds within which all training processes must have begun.
    slots_timeout_s
        Seconds to wait for executors that are still registering.
    logs
        Folder for the ranks' logs, relative to ``store``.
    """

    controller: str = "gloo"
    nics: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    start_timeout_s: float = 120.0
    slots_timeout_s: float = 30.0
    store: StoreRef | None = None
    logs: str | None = None

    def __post_init__(self) -> None:
        if self.controller not in CONTROLLERS:
            raise ParamError(
                f"controller='{self.controller}' is not known.{closest(self.controller, CONTROLLERS)} This version"
                f" has: {', '.join(CONTROLLERS)}",
                param="controller",
            )


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
    deadline = time.monotonic() + (0.0 if _is_complete(spark) else timeout_s)
    announced = False
    while (available := count_slots(spark)) < num_proc:
        if time.monotonic() >= deadline:
            raise NotEnoughSlotsError(
                f"needs {num_proc} slots, the cluster can run {available} at once. Lower num_proc, or give the job"
                " more executors or cores (spark.executor.instances, spark.executor.cores, spark.task.cpus).",
                needed=num_proc,
                available=available,
            )
        if not announced:
            logger.info("waiting up to %g s for %d slots, %d are there", timeout_s, num_proc, available)
            announced = True
        time.sleep(_POLL_S)


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


def run_barrier(spark: SparkSession, num_proc: int, payload: bytes, options: LaunchOptions) -> list[bytes]:
    """Run the payload on every rank of a new Horovod job.

    Parameters
    ----------
    spark
        The session whose executors run the ranks.
    num_proc
        Number of ranks.
    payload
        The pickled work, the same for every rank; see :mod:`hvdspark.worker`. It travels as a Spark broadcast.
    options
        How to start the ranks.

    Returns
    -------
    list of bytes
        What each rank answered, by rank.

    Raises
    ------
    NotEnoughSlotsError, LaunchError, RendezvousError
        When the ranks did not come up.
    WorkerFailedError
        When a rank failed; its message begins with the rank that failed first.
    """
    check_slots(spark, num_proc, options.slots_timeout_s)
    context = spark.sparkContext
    broadcast = context.broadcast(payload)
    driver_host = context.getConf().get("spark.driver.host", topology.LOOPBACK)
    task = _task_of(broadcast, options, driver_host)
    try:
        with _described(spark, f"hvdspark: {num_proc} ranks"):
            frame = spark.range(num_proc, numPartitions=num_proc)
            rows = frame.mapInArrow(task, _SCHEMA, barrier=True).collect()
    except Exception as exc:
        raise _lost_stage(exc) from exc
    finally:
        broadcast.destroy()
    failures = [Failure(**json.loads(row["failure"])) for row in rows if row["failure"] is not None]
    if failures:
        raise _error_of(failures, options)
    return [bytes(row["result"]) for row in sorted(rows, key=lambda row: row["rank"])]


def _task_of(
    broadcast: Any, options: LaunchOptions, driver_host: str
) -> Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    """Make the function that Spark runs in every task of the stage."""

    def task(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        from pyspark import BarrierTaskContext

        for _ in batches:
            pass
        rank, outcome = _run_task(BarrierTaskContext.get(), broadcast, options, driver_host)
        failure = json.dumps(outcome.failure.to_dict()) if outcome.failure is not None else None
        columns = {"rank": [rank], "result": [outcome.result], "failure": [failure]}
        schema = pa.schema([("rank", pa.int64()), ("result", pa.binary()), ("failure", pa.string())])
        yield pa.RecordBatch.from_pydict(columns, schema=schema)

    return task


def _run_task(
    barrier: BarrierTaskContext, broadcast: Any, options: LaunchOptions, driver_host: str
) -> tuple[int, Outcome]:
    """Meet the other tasks, then run this one's rank to its end."""
    partition = barrier.partitionId()
    host = barrier.getTaskInfos()[partition].address.rpartition(":")[0] or "localhost"
    try:
        address, error = devices.own_address(host, driver_host, options.nics), None
    except HvdSparkError as exc:
        address, error = topology.LOOPBACK, str(exc)
    peers, error = _meet(barrier, topology.Peer(partition, host, address), error)
    context = topology.assign_ranks(peers)[partition]
    with contextlib.ExitStack() as stack:
        server = None
        if context.rank == 0 and error is None:
            members = {topology.meeting_address(peers, peer.partition) for peer in peers}
            own = topology.meeting_address(peers, partition)
            server = stack.enter_context(RendezvousServer(own, members, context.size))
        offer = json.dumps({"error": error, "address": server.address if server is not None else None})
        offers = [json.loads(text) for text in barrier.allGather(offer)]
        error = next((found["error"] for found in offers if found["error"] is not None), None)
        if error is not None:
            return context.rank, Outcome(failure=Failure(context.rank, host, "meet", error, time=time.time()))
        meeting = next(found["address"] for found in offers if found["address"] is not None)
        interface = devices.interface_of(topology.meeting_address(peers, partition))
        environment = {
            **_defaults(context),
            **options.env,
            **topology.rank_environment(context),
            **gloo_environment((meeting[0], int(meeting[1])), interface),
        }
        with _log_file(options, context) as log:
            return context.rank, run_child(broadcast.value, context, environment, log, options.start_timeout_s)


def _meet(barrier: BarrierTaskContext, own: topology.Peer, error: str | None) -> tuple[list[topology.Peer], str | None]:
    """Exchange places with all tasks; returns them and the first error that anybody has."""
    found = [json.loads(text) for text in barrier.allGather(json.dumps({"peer": asdict(own), "error": error}))]
    peers = [topology.Peer(**entry["peer"]) for entry in found]
    error = next((entry["error"] for entry in found if entry["error"] is not None), None)
    lost = topology.unreachable(peers)
    if error is None and lost:
        error = (
            f"host {lost[0].host} offers only the loopback address {lost[0].address} to a job over several hosts; name"
            " an interface with nics=[…], or let the host's name resolve to its network address"
        )
    return peers, error


def _defaults(context: RankContext) -> dict[str, str]:
    """Return settings that a user may override with ``env``."""
    threads = str(devices.threads_per_rank(context.local_size))
    return {
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TF_NUM_INTRAOP_THREADS": threads,
        "OMP_NUM_THREADS": threads,
        "KERAS_BACKEND": "tensorflow",
    }


@contextlib.contextmanager
def _log_file(options: LaunchOptions, context: RankContext) -> Iterator[IO[bytes] | None]:
    """Open the rank's log in the Store; a Store that fails here must not stop the training."""
    if options.store is None or options.logs is None:
        # Spark keeps what its workers print with the executor's own log; in local mode it is the console.
        yield sys.stderr.buffer
        return
    try:
        store = Store.from_ref(options.store)
        store.make_folder(options.logs)
        path = store.path(options.logs, f"rank-{context.rank}.log")
        log: IO[bytes] = store.filesystem.open(path, "wb")
    except (HvdSparkError, OSError) as exc:
        logger.warning("no log for rank %d: %s", context.rank, exc)
        yield None
        return
    try:
        yield log
    finally:
        with contextlib.suppress(OSError, ValueError):
            log.close()


@contextlib.contextmanager
def _described(spark: SparkSession, text: str) -> Iterator[None]:
    """Name the job in Spark's UI."""
    key = "spark.job.description"
    context = spark.sparkContext
    before = context.getLocalProperty(key)
    context.setLocalProperty(key, text)
    try:
        yield
    finally:
        context.setLocalProperty(key, before)  # type: ignore[arg-type]  # None removes it


def _lost_stage(exc: Exception) -> HvdSparkError:
    """Translate an exception of Spark's own: the stage as a whole was lost, not the work of a rank."""
    text = str(exc).strip()
    first = next((line.strip() for line in text.splitlines() if line.strip()), type(exc).__name__)
    return LaunchError(
        f"the barrier stage was lost: {first}. An executor may have died or the job was cancelled; Spark's own log"
        " tells more."
    )


# A rank that died is the cause rather than those that raised because it was gone; of several causes the first in time.
_SEVERITY = {"user": 0, "meet": 0, "start": 0, "late": 1, "died": 1, "peer": 2}


def _error_of(failures: Sequence[Failure], options: LaunchOptions) -> HvdSparkError:
    """Make one error of all failures, which begins with the one that came first on its own account."""
    first = min(failures, key=lambda failure: (_SEVERITY[failure.kind], failure.time))
    parts = [f"rank {first.rank} on {first.host}: {first.error}"]
    if first.details:
        parts.append(first.details.rstrip())
    if first.log_tail:
        parts.append(f"Last lines of rank {first.rank}:\n{first.log_tail}")
    if options.store is not None and options.logs is not None:
        parts.append(f"Logs of all ranks: {Store.from_ref(options.store).url_of(options.logs)}")
    text = "\n\n".join(parts)
    never_ran = {"meet": RendezvousError, "start": LaunchError, "late": LaunchTimeoutError}
    if first.kind in never_ran:
        return never_ran[first.kind](text)
    return WorkerFailedError(
        text,
        failures={failure.rank: failure.error for failure in failures},
        root_cause=first.rank,
        log_tail=first.log_tail,
    )
