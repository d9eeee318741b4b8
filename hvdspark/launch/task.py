"""What one task of a barrier stage does: it starts a rank, meets the other tasks, and answers for the rank's end.

The rank's process comes first, and does its imports while the tasks tell each other where they are
(:mod:`hvdspark.launch.meeting`). They do that once, at the start, and never wait for each other afterwards: a task that
waits in ``allGather`` for a dead peer can take its executor down. Failures travel as data, because Spark would retry an
exception blindly; the driver decides what they mean.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

import cloudpickle
import pyarrow as pa

from hvdspark.errors import DataError, HvdSparkError, RendezvousError, SchemaError
from hvdspark.launch import control, devices, fabric, gpus, topology
from hvdspark.launch.alarm import Alarm, AlarmServer
from hvdspark.launch.child import Child, Patience
from hvdspark.launch.failures import Failure, Outcome
from hvdspark.launch.guard import STACKS
from hvdspark.launch.meeting import Agreement, Offer, agree, exchange
from hvdspark.launch.openmpi import OPEN_MPI, HostServer, place_environment, settings_of
from hvdspark.launch.options import LaunchOptions
from hvdspark.launch.watch import report
from hvdspark.plan import FitPlan, RankContext
from hvdspark.recording import publish_launch
from hvdspark.store import Store

if TYPE_CHECKING:
    from pyspark import Accumulator, BarrierTaskContext

    from hvdspark.data.feed import RowFeed, TakenRows

logger = logging.getLogger(__name__)

# What a task answers.
SCHEMA = "rank long, result binary, failure string"

_MEET_TIMEOUT_S = 60.0
_FED_TIMEOUT_S = 7 * 86400.0


@dataclass(frozen=True)
class Stage:
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
        options, own, peers = self.options, barrier.partitionId(), peers_of(barrier)
        # By Spark's names: who is on one machine is known when the tasks have met.
        ranks = topology.assign_ranks(peers)
        context = ranks[own]
        with Child(options.recipe(context), warm=options.warm_pool) as child, contextlib.ExitStack() as stack:
            servers: dict[str, control.Server | AlarmServer] = {}
            rows = None
            try:
                mpi = self._find_mpi(context)
                rows = self._take(batches, stack)
                ports = fabric.rdma_ports() if options.nics else []
                address = devices.own_address(peers[own].host, self.driver_host, options.nics, ports)
                peers[own] = dataclasses.replace(peers[own], address=address)
                if context.rank == 0:
                    servers = self._open_servers(peers, own, stack)
                offer = Offer(
                    address=address,
                    machine=devices.machine(),
                    servers={name: server.address for name, server in servers.items()},
                    mpi=mpi,
                    has_rdma=options.controller == "auto" and self._has_rdma(),
                    rows=None if rows is None else rows.report,
                    gpus=gpus.addresses_of(barrier.resources()),
                )
            except (HvdSparkError, OSError) as exc:
                offer = Offer(error=str(exc), is_passing=isinstance(exc, OSError))
            offers: list[Offer] = []
            try:
                offers = exchange(barrier, offer, self.nonce, self._patience_s)
                agreed = agree(peers, offers, options.controller)
                ranks = topology.assign_ranks(agreed.peers)
                context = ranks[own]
                control.admit(servers, agreed.peers, agreed.plane, agreed.mpi)
                alarm = stack.enter_context(Alarm(agreed.alarm, self.token, context.rank, _hosts(ranks)))
                interface = devices.interface_of(topology.meeting_address(agreed.peers, own))
                network = self._network(agreed, interface, context, offer.gpus)
                given = [offer.gpus for offer in offers]
                own_gpus = gpus.gpu_environment(ranks, given, own, options.env, self.gpus_per_task)
                plan = None if rows is None else _planned(rows, agreed.peers, offers)
                scratch = stack.enter_context(_scratch(options))
                place = topology.host_numbers(ranks)[context.rank]
                host_server = self._open_host_server(agreed, place, context, scratch, stack)
            except (RendezvousError, DataError, SchemaError, OSError) as exc:
                return ranks, Outcome(failure=Failure.before(exc, context, have_met=bool(offers)))
            if context.rank == 0:
                _note_launch(options, ranks, plan, network)
            environment = {
                **network,
                **own_gpus,
                **options.variables(context),
                "TMPDIR": scratch,
                STACKS: f"{scratch}/stacks",
                **topology.rank_environment(context),
                **control.environment_of(agreed.plane, agreed.meeting, self.token, interface),
                **place_environment(agreed.mpi, place),
            }
            with _log_file(options, context) as log:
                patience = Patience(options.start_timeout_s, options.stall_timeout_s or None)
                payload = self.broadcast.value
                own_arguments = b"" if plan is None else cloudpickle.dumps((plan,))
                outcome = child.run(payload, context, environment, log, patience, own_arguments, alarm, scratch)
            if host_server is not None and outcome.failure is None:
                host_server.wait()
            return ranks, outcome

    def _find_mpi(self, context: RankContext) -> str:
        """Name the MPI of this host, if any; raises :class:`RendezvousError` without one where there must be."""
        # Looked for only where it decides: finding a library can take a process of its own.
        name, hindrance = ("", "") if self.options.controller == "gloo" else control.find_mpi()
        if hindrance and self.options.controller == "mpi":
            raise RendezvousError(f"controller='mpi' cannot be on {context.host}: {hindrance}, or use 'gloo'")
        return name

    def _has_rdma(self) -> bool:
        return bool(fabric.usable(fabric.rdma_ports(), self.options.rdma, self.options.nics))

    def _open_host_server(
        self,
        agreed: Agreement,
        place: int,
        context: RankContext,
        scratch: str,
        stack: contextlib.ExitStack,
    ) -> HostServer | None:
        """Start what the ranks of this host ask for their places under Open MPI, if this is the first of them."""
        if agreed.mpi != OPEN_MPI or context.local_rank > 0:
            return None
        return stack.enter_context(HostServer(agreed.meeting, self.token, place, context.size, scratch))

    def _open_servers(
        self, peers: list[topology.Peer], own: int, stack: contextlib.ExitStack
    ) -> dict[str, control.Server | AlarmServer]:
        """Open what the ranks meet at, and the alarm, by name; they admit nobody yet."""
        servers = control.open_servers(self.options.controller, peers, own, self.token, stack)
        alarm = AlarmServer(topology.meeting_address(peers, own), (), len(peers), self.token)
        return {**servers, "alarm": stack.enter_context(alarm)}

    def _network(
        self, agreed: Agreement, interface: str, context: RankContext, own_gpus: Sequence[str]
    ) -> dict[str, str]:
        """Return what the rank and its libraries are told of the network."""
        options, on_one_host = self.options, context.local_size == context.size
        if not on_one_host:
            has_gpus = gpus.may_be_used(own_gpus, options.env)
            fabric.check_use(options.rdma, agreed.plane, agreed.reason, has_gpus=has_gpus, host=context.host)
        settings = fabric.fabric_environment(
            interface,
            [] if on_one_host and options.rdma == "auto" else fabric.rdma_ports(),
            options.rdma,
            options.nics,
            host=context.host,
            has_peer_memory=fabric.has_peer_memory(),
        )
        transport = fabric.describe(settings, agreed.plane, on_one_host=on_one_host)
        controller = f"{agreed.plane} by {agreed.mpi}" if agreed.mpi else agreed.plane
        return {
            **settings,
            **settings_of(agreed.mpi),
            fabric.NETWORK: f"controller {controller} ({agreed.reason}), {transport}",
        }

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


def _planned(rows: TakenRows, peers: Sequence[topology.Peer], offers: Sequence[Offer]) -> FitPlan:
    """Plan the fit on the rows of all tasks."""
    ranks = topology.assign_ranks(peers)
    order = sorted(range(len(offers)), key=lambda partition: ranks[partition].rank)
    return rows.plan([offers[partition].rows or "" for partition in order])


def _note_launch(
    options: LaunchOptions, ranks: Mapping[int, RankContext], plan: FitPlan | None, network: Mapping[str, str]
) -> None:
    """Leave a note of where the ranks are and how they talk; a Store that fails here must not stop the training."""
    if options.store is None or options.logs is None:
        return
    rows = {}
    if plan is not None:
        rows = {"rows": plan.train.rows, "val_rows": 0 if plan.val is None else plan.val.rows}
    try:
        # Of the user's variables a run keeps the names alone.
        own = {name: value for name, value in network.items() if name not in options.env}
        text = f"{network[fabric.NETWORK]}; {fabric.settings_in(own)}"
        publish_launch(Store.from_ref(options.store), options.logs, list(ranks.values()), rows, text)
    except (HvdSparkError, OSError) as exc:
        logger.warning("no note of where the ranks are: %s", exc)


def peers_of(barrier: BarrierTaskContext) -> list[topology.Peer]:
    """List the tasks by where Spark put them; at which addresses they can be reached is what they tell each other."""
    hosts = [info.address.rpartition(":")[0] or "localhost" for info in barrier.getTaskInfos()]
    return [topology.Peer(partition, host, "") for partition, host in enumerate(hosts)]


def _hosts(ranks: Mapping[int, RankContext]) -> list[str]:
    """List the hosts by rank."""
    return [context.host for context in sorted(ranks.values(), key=lambda context: context.rank)]


def _scratch(options: LaunchOptions) -> tempfile.TemporaryDirectory[str]:
    """Make the rank's folder for temporary files, which one that is killed cannot remove itself.

    Where this task is killed, the rank's guard removes it.
    """
    place = options.env.get("TMPDIR")
    try:
        return tempfile.TemporaryDirectory(prefix="hvdspark-rank-", dir=place, ignore_cleanup_errors=True)
    except OSError as exc:
        raise OSError(
            f"the rank has no place for temporary files: {exc}. Make room there, or name another folder of this host by"
            " the variable TMPDIR (in env, or an estimator's backend_env)."
        ) from exc


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
