"""``run_barrier``: one barrier stage in which every task runs one rank.

Spark starts all tasks of the stage together or none. Each starts its rank's process first, which does its imports
while the tasks tell each other where they are (:mod:`hvdspark.launch.meeting`). They do that once, at the start, and
never wait for each other afterwards: a task that waits in ``allGather`` for a dead peer can take its executor down.
Failures travel as data, because Spark would retry an exception blindly; the driver decides what they mean.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import IO, TYPE_CHECKING, Any

import cloudpickle
import pyarrow as pa

from hvdspark.errors import (
    DataError,
    HvdSparkError,
    LaunchTimeoutError,
    ParamError,
    RendezvousError,
    SchemaError,
    closest,
)
from hvdspark.launch import control, devices, fabric, gpus, pool, topology
from hvdspark.launch.alarm import Alarm, AlarmServer
from hvdspark.launch.answers import LEAST_STALL_S
from hvdspark.launch.child import Child, Patience
from hvdspark.launch.control import CONTROLLERS
from hvdspark.launch.fabric import Rdma
from hvdspark.launch.failures import Failure, Outcome, error_of, lost_stage
from hvdspark.launch.guard import STACKS
from hvdspark.launch.meeting import Agreement, Offer, agree, exchange
from hvdspark.launch.process import Recipe, recipe_of
from hvdspark.launch.slots import check_slots
from hvdspark.launch.transport import check_transport
from hvdspark.launch.watch import Watch, report, reports_of
from hvdspark.plan import RankContext, StoreRef
from hvdspark.store import Store

if TYPE_CHECKING:
    from pyspark import Accumulator, BarrierTaskContext
    from pyspark.sql import DataFrame, Row, SparkSession

    from hvdspark.data.feed import FedStage, RowFeed, TakenRows

logger = logging.getLogger(__name__)

_SCHEMA = "rank long, result binary, failure string"
_MEET_TIMEOUT_S = 60.0
_FED_TIMEOUT_S = 7 * 86400.0
# Horovod's own timeouts come after ours, which know who is to blame.
_GLOO_TIMEOUT, _AFTER_STALL_S = "HOROVOD_GLOO_TIMEOUT_SECONDS", 30


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


def run_barrier(
    spark: SparkSession, num_proc: int, payload: bytes, options: LaunchOptions, fed: FedStage | None = None
) -> list[bytes]:
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
    fed
        Rows that come with the tasks; the work then is given the plan that is made of them as its first argument.

    Returns
    -------
    list of bytes
        What each rank answered, by rank.

    Raises
    ------
    NotEnoughSlotsError, LaunchTimeoutError, LaunchError, RendezvousError
        When the ranks did not come up.
    ParamError
        When they would talk unprotected in a session that wants protection, see
        :func:`hvdspark.launch.transport.check_transport`.
    DataError, SchemaError
        When the rows that came with the tasks cannot be trained on.
    WorkerFailedError
        When a rank failed; its message begins with the rank that failed first.
    """
    check_transport(spark, allow_insecure=options.allow_insecure_transport)
    check_slots(spark, num_proc, options.slots_timeout_s)
    context = spark.sparkContext
    broadcast = context.broadcast(payload)
    driver_host = context.getConf().get("spark.driver.host", topology.LOOPBACK)
    nonce, token = secrets.token_hex(16), secrets.token_hex(16)
    gpus_per_task = float(context.getConf().get(gpus.AMOUNT, "1"))
    reports, feed = reports_of(context), None if fed is None else fed.feed
    stage = _Stage(broadcast, options, driver_host, nonce, token, feed, gpus_per_task, reports)
    frame = spark.range(num_proc, numPartitions=num_proc) if fed is None else fed.frame
    watch = Watch(spark, nonce, options.start_timeout_s)
    try:
        rows = watch.run(partial(_run_stage, frame, stage.task, f"hvdspark: {num_proc} ranks"))
    except LaunchTimeoutError:
        raise
    except Exception as exc:
        if watch.given_up:
            raise error_of(watch.given_up, options.logs_url) from exc
        raise lost_stage(exc) from exc
    finally:
        broadcast.destroy()
    failures = [Failure.from_json(row["failure"]) for row in rows if row["failure"] is not None]
    if failures:
        raise error_of(failures, options.logs_url)
    return [bytes(row["result"]) for row in sorted(rows, key=lambda row: row["rank"])]


def warm_up(spark: SparkSession, num_proc: int, options: LaunchOptions) -> None:
    """Have the executors import what ranks will need; begins it and returns.

    It can only save time: what goes wrong with it shows when the ranks are launched, if at all.

    Parameters
    ----------
    spark, num_proc, options
        As for the :func:`run_barrier` to come.
    """
    if not (options.warm_pool and options.preload):
        return
    from pyspark import BarrierTaskContext, InheritableThread

    def task(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for _ in batches:
            pass
        barrier = BarrierTaskContext.get()
        pool.prewarm(_recipe(topology.assign_ranks(_peers(barrier))[barrier.partitionId()], options))
        return iter(())

    def launch() -> None:
        try:
            frame = spark.range(num_proc, numPartitions=num_proc)
            _run_stage(frame, task, f"hvdspark: imports ahead of {num_proc} ranks")
        except Exception as exc:  # noqa: BLE001 - Spark's own errors are of many kinds
            logger.debug("no imports ahead: %s", exc)

    InheritableThread(target=launch, daemon=True, session=spark).start()


def _run_stage(
    frame: DataFrame, task: Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]], text: str
) -> list[Row]:
    """Run a task on every partition, all at once."""
    with _described(frame.sparkSession, text):
        return frame.mapInArrow(task, _SCHEMA, barrier=True).collect()


@dataclass(frozen=True)
class _Stage:
    """What the tasks of the stage need; travels to every one of them."""

    broadcast: Any
    options: LaunchOptions
    driver_host: str
    nonce: str
    token: str = field(repr=False)
    feed: RowFeed | None
    gpus_per_task: float
    reports: Accumulator[list[str]]

    def task(self, batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Be one task: run a rank, and answer with its result or its failure."""
        from pyspark import BarrierTaskContext

        barrier = BarrierTaskContext.get()
        ranks, outcome = self._run(barrier, batches)
        own, failure = barrier.partitionId(), None
        if outcome.failure is not None:
            failure = outcome.failure.to_json()
            self.reports.add([report(self.nonce, barrier.stageId(), own, ranks, outcome.failure)])
        columns = {"rank": [ranks[own].rank], "result": [outcome.result], "failure": [failure]}
        schema = pa.schema([("rank", pa.int64()), ("result", pa.binary()), ("failure", pa.string())])
        yield pa.RecordBatch.from_pydict(columns, schema=schema)

    def _run(
        self, barrier: BarrierTaskContext, batches: Iterable[pa.RecordBatch]
    ) -> tuple[Mapping[int, RankContext], Outcome]:
        """Start this task's rank, take its rows and meet the other tasks meanwhile, then run it to its end.

        Returns the places of all ranks, by partition, and how this one ended.
        """
        options, own, peers = self.options, barrier.partitionId(), _peers(barrier)
        # By Spark's names: who is on one machine is known when the tasks have met.
        ranks = topology.assign_ranks(peers)
        context = ranks[own]
        with Child(_recipe(context, options), warm=options.warm_pool) as child, contextlib.ExitStack() as stack:
            servers, rows = {}, None
            try:
                # Looked for only where it decides: finding a library can take a process of its own.
                hindrance = None if options.controller == "gloo" else control.mpi_hindrance()
                if hindrance is not None and options.controller == "mpi":
                    raise RendezvousError(f"controller='mpi' cannot be on {context.host}: {hindrance}, or use 'gloo'")
                rows = self._take(batches, stack)
                address = devices.own_address(peers[own].host, self.driver_host, options.nics)
                peers[own] = dataclasses.replace(peers[own], address=address)
                if context.rank == 0:
                    servers = self._open_servers(peers, own, stack)
                offer = Offer(
                    address=address,
                    machine=devices.machine(),
                    servers={name: server.address for name, server in servers.items()},
                    has_mpi=hindrance is None,
                    has_rdma=options.controller == "auto" and fabric.has_rdma(),
                    rows=None if rows is None else rows.report,
                    gpus=gpus.addresses_of(barrier.resources()),
                )
            except (HvdSparkError, OSError) as exc:
                offer = Offer(error=str(exc))
            try:
                offers = exchange(barrier, offer, self.nonce, self._patience_s)
                agreed = agree(peers, offers, options.controller)
                ranks = topology.assign_ranks(agreed.peers)
                context = ranks[own]
                control.admit(servers.values(), agreed.peers)
                alarm = stack.enter_context(Alarm(agreed.alarm, self.token, context.rank, _hosts(ranks)))
                interface = devices.interface_of(topology.meeting_address(agreed.peers, own))
                network = self._network(agreed, interface, context)
                given = [offer.gpus for offer in offers]
                own_gpus = gpus.gpu_environment(ranks, given, own, options.env, self.gpus_per_task)
                plan = b"" if rows is None else _planned(rows, agreed.peers, offers)
            except (RendezvousError, DataError, SchemaError, OSError) as exc:
                return ranks, Outcome(failure=Failure.before(exc, context))
            scratch = stack.enter_context(_scratch(options))
            environment = {
                **network,
                **own_gpus,
                **_settings(context, options),
                "TMPDIR": scratch,
                STACKS: f"{scratch}/stacks",
                **topology.rank_environment(context),
                **control.environment_of(agreed.plane, agreed.meeting, self.token, interface),
            }
            with _log_file(options, context) as log:
                patience = Patience(options.start_timeout_s, options.stall_timeout_s or None)
                payload = self.broadcast.value
                return ranks, child.run(payload, context, environment, log, patience, plan, alarm)

    def _open_servers(
        self, peers: list[topology.Peer], own: int, stack: contextlib.ExitStack
    ) -> dict[str, control.Server | AlarmServer]:
        """Open what the ranks meet at, and the alarm, by name; they admit nobody yet."""
        servers = control.open_servers(self.options.controller, peers, own, self.token, stack)
        alarm = AlarmServer(topology.meeting_address(peers, own), (), len(peers), self.token)
        return {**servers, "alarm": stack.enter_context(alarm)}

    def _network(self, agreed: Agreement, interface: str, context: RankContext) -> dict[str, str]:
        """Return what the rank and its libraries are told of the network."""
        options, on_one_host = self.options, context.local_size == context.size
        settings = fabric.fabric_environment(
            interface,
            [] if on_one_host and options.rdma == "auto" else fabric.rdma_ports(),
            options.rdma,
            options.nics,
            host=context.host,
            has_peer_memory=fabric.has_peer_memory(),
        )
        transport = fabric.describe(settings, on_one_host=on_one_host)
        return {**settings, fabric.NETWORK: f"controller {agreed.plane} ({agreed.reason}), {transport}"}

    def _take(self, batches: Iterable[pa.RecordBatch], stack: contextlib.ExitStack) -> TakenRows | None:
        """Take the rows that came with the task, where it is for them that it runs."""
        if self.feed is not None:
            return stack.enter_context(self.feed.taken(batches))
        for _ in batches:
            pass
        return None

    @property
    def _patience_s(self) -> float:
        """Seconds to wait for the other tasks: those that take rows come when Spark has computed them."""
        return _FED_TIMEOUT_S if self.feed is not None else max(self.options.start_timeout_s, _MEET_TIMEOUT_S)


def _planned(rows: TakenRows, peers: Sequence[topology.Peer], offers: Sequence[Offer]) -> bytes:
    """Plan the fit on the rows of all tasks; returns the plan as the rank's own argument."""
    ranks = topology.assign_ranks(peers)
    order = sorted(range(len(offers)), key=lambda partition: ranks[partition].rank)
    return bytes(cloudpickle.dumps((rows.plan([offers[partition].rows or "" for partition in order]),)))


def _peers(barrier: BarrierTaskContext) -> list[topology.Peer]:
    """List the tasks by where Spark put them; at which addresses they can be reached is what they tell each other."""
    hosts = [info.address.rpartition(":")[0] or "localhost" for info in barrier.getTaskInfos()]
    return [topology.Peer(partition, host, "") for partition, host in enumerate(hosts)]


def _hosts(ranks: Mapping[int, RankContext]) -> list[str]:
    """List the hosts by rank."""
    return [context.host for context in sorted(ranks.values(), key=lambda context: context.rank)]


def _settings(context: RankContext, options: LaunchOptions) -> dict[str, str]:
    """Return the variables of a rank that are known before the tasks have met."""
    gloo_timeout_s = int(options.stall_timeout_s or _FED_TIMEOUT_S) + _AFTER_STALL_S
    return {**_defaults(context), _GLOO_TIMEOUT: str(gloo_timeout_s), **options.env}


def _recipe(context: RankContext, options: LaunchOptions) -> Recipe:
    # Horovod reads its variables when it starts, all others may be read by an import.
    settings = _settings(context, options)
    early = {name: value for name, value in settings.items() if not name.startswith("HOROVOD_")}
    return recipe_of(early, options.preload)


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


def _scratch(options: LaunchOptions) -> tempfile.TemporaryDirectory[str]:
    """Make the rank's folder for temporary files, which one that is killed cannot remove itself."""
    place = options.env.get("TMPDIR")
    return tempfile.TemporaryDirectory(prefix="hvdspark-rank-", dir=place, ignore_cleanup_errors=True)


@contextlib.contextmanager
def _log_file(options: LaunchOptions, context: RankContext) -> Iterator[IO[bytes] | None]:
    """Open the rank's log in the Store; a Store that fails here must not stop the training."""
    if options.store is None or options.logs is None:
        # Spark keeps what its workers print with the executor's own log; in local mode it is the console.
        yield sys.stderr.buffer
        return
    try:
        store = Store.from_ref(options.store)
        log = store.open_file(options.logs, f"rank-{context.rank}.log")
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
