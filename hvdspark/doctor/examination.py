"""``examine``: looks at a cluster from the driver, one step after the other, and goes on where one finds errors."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import hvdspark
from hvdspark.doctor import probe
from hvdspark.doctor.findings import Allreduce, Examination, Finding, Severity
from hvdspark.doctor.judge import PACKAGES, Wanted, judge, judge_ports, judge_store, name_of
from hvdspark.doctor.measure import LARGE_BYTES, SMALL_BYTES, time_allreduce
from hvdspark.doctor.session import PYTHON
from hvdspark.doctor.stage import Probed, bounded, probe_executors
from hvdspark.doctor.trial import StoreTrial
from hvdspark.errors import HvdSparkError, LaunchTimeoutError, ParamError, StoreError, telling_line
from hvdspark.launch import topology
from hvdspark.launch.options import LaunchOptions
from hvdspark.launch.slots import count_slots
from hvdspark.launch.transport import check_transport
from hvdspark.run import active_session
from hvdspark.store import Store

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

# Executors come one by one: how long to wait for the next where some are known to be missing, and where not.
_SLOTS_S, _TOO_FEW_S, _SETTLED_S, _POLL_S = 30.0, 10.0, 3.0, 0.5
_STALL_S = 30.0

# Below the first an ordinary gigabit network does better; the second is ten times what Horovod takes by itself.
_SLOW_BYTES_PER_S, _SLOW_S = 100e6, 0.05

# With one of these wrong ranks do not start, and trying would only say so once more.
_NEEDED = ("settings", "tasks", "python", "packages", "horovod", "ports")


@dataclass
class _Examiner:
    """An examination while it goes on; fields as the parameters of :func:`examine`."""

    spark: SparkSession
    store: Store | None
    num_proc: int | None
    options: LaunchOptions
    timeout_s: float
    findings: list[Finding] = field(default_factory=list)
    executors: dict[str, Any] = field(default_factory=dict)
    allreduce: Allreduce | None = None

    def run(self) -> Examination:
        self._look_at_settings()
        slots = self._count_slots()
        if slots:
            with contextlib.ExitStack() as stack:
                trial = self._open_trial(stack)
                self._look_at_executors(slots, trial)
            self._measure(min(slots, self.num_proc or slots))
        return Examination(tuple(self.findings), self.executors, self.allreduce)

    def _add(self, check: str, severity: Severity, found: str, remedy: str = "", where: str = "cluster") -> None:
        self.findings.append(Finding(check, severity, where, found, remedy))

    def _look_at_settings(self) -> None:
        context = self.spark.sparkContext
        conf = context.getConf()
        count = len(self.findings)
        if conf.get("spark.dynamicAllocation.enabled", "false") == "true":
            self._add(
                "settings",
                "error",
                "spark.dynamicAllocation.enabled is true, and Spark runs no barrier stage with it",
                "Submit with --conf spark.dynamicAllocation.enabled=false and a fixed number of executors.",
            )
        named = conf.get(PYTHON)
        if named is not None and named != context.pythonExec:
            self._add(
                "settings",
                "warning",
                f"{PYTHON} is {named}, but executors run {context.pythonExec}: only spark-submit reads that setting",
                "Set PYSPARK_PYTHON before the session is made, or start the program by spark-submit.",
                "driver",
            )
        try:
            check_transport(self.spark, allow_insecure=self.options.allow_insecure_transport)
        except ParamError as exc:
            self._add("settings", "error", *_halves(exc))
        if len(self.findings) == count:
            found = f"Spark {self.spark.version} on {context.master}; executors run {context.pythonExec}"
            self._add("settings", "ok", found)

    def _count_slots(self) -> int:
        """Wait for executors that are still coming; returns how many tasks can run at once."""
        slots = _await_slots(self.spark, self.num_proc, min(_SLOTS_S, self.timeout_s))
        wanted = self.num_proc or 1
        if slots >= wanted:
            self._add("slots", "ok", f"slots: {slots}" + (f", needed: {wanted}" if self.num_proc else ""))
        else:
            self._add(
                "slots",
                "error",
                f"needs {wanted} slot{'s' * (wanted > 1)}, the cluster can run {slots} at once",
                "Lower num_proc, give the job more executors or cores (spark.executor.instances, spark.executor.cores,"
                " spark.cores.max, spark.task.cpus), or wait for the jobs that hold them. Workers without an executor"
                " of this job have too few free cores or too little memory (spark.executor.memory).",
            )
        return slots

    def _open_trial(self, stack: contextlib.ExitStack) -> StoreTrial | None:
        if self.store is None:
            self._add("store", "warning", "no Store was given, so none was looked at", "Give its address (--store).")
            return None
        try:
            return stack.enter_context(StoreTrial(self.store))
        except StoreError as exc:
            remedy = "Give a folder, or an object store, that the driver and all executors can write."
            self._add("store", "error", str(exc), remedy, "driver")
            return None

    def _look_at_executors(self, slots: int, trial: StoreTrial | None) -> None:
        driver = probe.examine({"packages": PACKAGES})
        settings = {
            "packages": PACKAGES,
            "horovod": self.timeout_s / 2,
            "store": None if trial is None else trial.settings,
            "driver": self.spark.sparkContext.getConf().get("spark.driver.host", topology.LOOPBACK),
            "token": secrets.token_hex(16),
        }
        try:
            probed = probe_executors(self.spark, slots, settings, self.timeout_s)
        except LaunchTimeoutError as exc:
            self._add("tasks", "error", *_halves(exc))
            return
        drivers = {name: fact.get("value") for name, fact in driver.items()}
        wanted = Wanted(drivers, self.options.controller)
        self._say_hindrance(probed)
        on_host = Counter[str]()
        for answer, tasks in zip(probed.answers, probed.tasks, strict=True):
            on_host[answer["host"]] += len(tasks)
        for answer, tasks in zip(probed.answers, probed.tasks, strict=True):
            self.executors[name_of(answer)] = answer
            self.findings += judge(answer, tasks, wanted, on_host[answer["host"]] - len(tasks))
        self.findings += judge_ports(probed.answers)
        if self.store is not None and trial is not None:
            left = trial.came_back([answer["executor"] for answer in probed.answers])
            self.findings += judge_store(self.store.url, probed.answers, left)

    def _say_hindrance(self, probed: Probed) -> None:
        if probed.hindrance is None:
            self._add("tasks", "ok", f"a barrier stage ran; executors: {len(probed.answers)}")
            return
        self._add(
            "tasks",
            "error",
            f"a barrier stage of Python tasks does not run: {probed.hindrance}",
            "See what is said of the executors' Python; if nothing is, their logs tell more.",
        )
        for silent in probed.silent:
            self._add(
                "python",
                "error",
                f"{self.spark.sparkContext.pythonExec} does not run: {silent['error']}",
                "Install it there at that path, or set PYSPARK_PYTHON (spark.pyspark.python with spark-submit).",
                name_of(silent),
            )

    def _measure(self, ranks: int) -> None:
        if any(finding.severity == "error" and finding.check in _NEEDED for finding in self.findings):
            self._add("allreduce", "warning", "was not measured, because of the errors above", "Mend these first.")
            return
        job = partial(
            hvdspark.run,
            time_allreduce,
            num_proc=ranks,
            controller=self.options.controller,
            nics=self.options.nics,
            start_timeout=self.timeout_s,
            stall_timeout_s=_STALL_S,
            spark=self.spark,
            warm_pool=False,
            allow_insecure_transport=self.options.allow_insecure_transport,
        )
        try:
            found = bounded(self.spark, job, "the job that measures allreduce", 2 * self.timeout_s)
        except HvdSparkError as exc:
            self._add("allreduce", "error", *_halves(exc))
            return
        except Exception as exc:  # noqa: BLE001 - Spark's own errors are of many kinds
            self._add("allreduce", "error", telling_line(exc), "Look at the executors' logs.")
            return
        self._judge_speed(found)

    def _judge_speed(self, found: Sequence[dict[str, Any]]) -> None:
        # The ring is as fast as its slowest rank.
        small_s, large_s = (max(one[name] for one in found) for name in ("small_s", "large_s"))
        speed = Allreduce(found[0]["controller"], len(found), small_s, LARGE_BYTES, large_s)
        if speed.ranks == 1:
            self._add("allreduce", "ok", f"Horovod runs over {speed.controller}; one rank has nobody to average with")
            return
        self.allreduce = speed
        text = (
            f"{speed.ranks} ranks over {speed.controller}: {SMALL_BYTES} bytes in {1e3 * small_s:.1f} ms,"
            f" {LARGE_BYTES >> 20} MiB in {1e3 * large_s:.0f} ms ({speed.bandwidth_bytes_per_s / 1e6:.0f} MB/s)"
        )
        is_slow = small_s > _SLOW_S or speed.bandwidth_bytes_per_s < _SLOW_BYTES_PER_S
        remedy = (
            "That is slow: other work may keep the hosts or the network busy, or ranks talk over the wrong interface"
            " (nics); look at it again on a quiet cluster."
        )
        self._add("allreduce", "warning" if is_slow else "ok", text, remedy if is_slow else "")


def examine(
    spark: SparkSession | None = None,
    *,
    store: Store | None = None,
    num_proc: int | None = None,
    controller: str = "gloo",
    nics: Sequence[str] = (),
    allow_insecure_transport: bool = False,
    timeout_s: float = 120.0,
) -> Examination:
    """Look for what is wrong with a cluster.

    Every executor is examined by a task of a barrier stage, and then all ranks average arrays by Horovod. What one step
    finds does not keep the next from being tried, so that all that is wrong is known at once.

    Parameters
    ----------
    spark
        The session; by default the active one.
    store
        The Store that trainings will use: whether all executors share it.
    num_proc
        How many ranks there are to be; by default as many as the cluster can run at once.
    controller, nics, allow_insecure_transport
        As for :func:`hvdspark.run`.
    timeout_s
        Seconds that each of the two jobs may take to begin and answer; the second may run as long again.

    Returns
    -------
    Examination
        With findings of all kinds, good ones too; ``severity`` is that of the worst.

    Raises
    ------
    ParamError
        When a parameter has a value that cannot be used.
    LaunchError
        When there is no session.
    """
    if num_proc is not None and num_proc < 1:
        raise ParamError(f"num_proc={num_proc}: give at least one rank", param="num_proc")
    if not timeout_s > 0:
        raise ParamError(f"timeout_s={timeout_s:g}: give a positive number of seconds", param="timeout_s")
    options = LaunchOptions(controller=controller, nics=tuple(nics), allow_insecure_transport=allow_insecure_transport)
    return _Examiner(spark or active_session(), store, num_proc, options, timeout_s).run()


def _await_slots(spark: SparkSession, wanted: int | None, timeout_s: float) -> int:
    """Count slots once there are enough, or no more have come for a while."""
    deadline, patience_s = time.monotonic() + timeout_s, _SETTLED_S if wanted is None else _TOO_FEW_S
    slots, since = count_slots(spark), time.monotonic()
    while time.monotonic() < deadline and not (slots and time.monotonic() - since > patience_s):
        if wanted is not None and slots >= wanted:
            break
        time.sleep(_POLL_S)
        found = count_slots(spark)
        if found != slots:
            slots, since = found, time.monotonic()
    return slots


def _halves(exc: HvdSparkError) -> tuple[str, str]:
    """Return what an error says first, and where to read on."""
    return str(exc).partition("\n")[0], f"See {exc.help}."
