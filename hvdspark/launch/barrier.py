"""``run_barrier``: one barrier stage in which every task runs one rank.

Spark starts all tasks of the stage together or none; :mod:`hvdspark.launch.task` is what each of them does.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from hvdspark.errors import LaunchTimeoutError
from hvdspark.launch import gpus, pool, topology
from hvdspark.launch.failures import Failure, error_of, lost_stage
from hvdspark.launch.options import LaunchOptions
from hvdspark.launch.slots import check_slots
from hvdspark.launch.task import SCHEMA, Stage, peers_of
from hvdspark.launch.transport import check_transport
from hvdspark.launch.watch import Watch, reports_of

if TYPE_CHECKING:
    from pyspark.sql import DataFrame, Row, SparkSession

    from hvdspark.data.feed import FedStage

logger = logging.getLogger(__name__)


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
    stage = Stage(broadcast, options, driver_host, nonce, token, feed, gpus_per_task, reports)
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
    from pyspark import BarrierTaskContext

    def task(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        for _ in batches:
            pass
        barrier = BarrierTaskContext.get()
        pool.prewarm(options.recipe(topology.assign_ranks(peers_of(barrier))[barrier.partitionId()]))
        return iter(())

    try:
        with _described(spark, f"hvdspark: imports ahead of {num_proc} ranks"):
            frame = spark.range(num_proc, numPartitions=num_proc).mapInArrow(task, SCHEMA, barrier=True)
            java: Any = frame._jdf  # of a classic session, as are all that a fit runs in
            # It is with Spark when this returns: what comes first is run first, and these tasks find no room at once
            # among those that write rows.
            java.toJavaRDD().countAsync()
    except Exception as exc:  # noqa: BLE001 - Spark's own errors are of many kinds
        logger.debug("no imports ahead: %s", exc)


def _run_stage(
    frame: DataFrame, task: Callable[[Iterable[pa.RecordBatch]], Iterator[pa.RecordBatch]], text: str
) -> list[Row]:
    """Run a task on every partition, all at once."""
    with _described(frame.sparkSession, text):
        return frame.mapInArrow(task, SCHEMA, barrier=True).collect()


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
