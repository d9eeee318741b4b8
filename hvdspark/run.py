"""``run``: any function under Horovod on barrier tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hvdspark.errors import LaunchError

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from hvdspark.launch.fabric import Rdma


def run(
    fn: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    num_proc: int | None = None,
    *,
    start_timeout: float = 120.0,
    stall_timeout_s: float = 600.0,
    slots_timeout_s: float = 30.0,
    env: Mapping[str, str] | None = None,
    nics: Sequence[str] = (),
    rdma: Rdma = "auto",
    controller: str = "gloo",
    preload: Sequence[str] = (),
    warm_pool: bool = True,
    allow_insecure_transport: bool = False,
    spark: SparkSession | None = None,
) -> list[Any]:
    """Run a function on every rank of a new Horovod job, one rank per Spark barrier task.

    The function calls ``hvd.init()`` of the Horovod flavour that it uses; all that ``init`` needs is set.

    Parameters
    ----------
    fn
        The function. It travels to the executors by cloudpickle, so that it may be defined anywhere.
    args, kwargs
        Its arguments, the same on every rank.
    num_proc
        Number of ranks; by default as many tasks as the cluster can run at once.
    start_timeout
        Seconds within which every rank must have begun.
    stall_timeout_s
        Seconds after which a rank that gives no sign of life (that was stopped, say) is given up, 5 at least; 0 for
        never. A function that calls :func:`hvdspark.moved_on` is also given up when it no longer does.
    slots_timeout_s
        Seconds to wait for executors that are still coming.
    env
        Environment variables for the ranks.
    nics
        Network interfaces or RDMA devices that the ranks may use; by default interfaces are chosen from Spark's host
        names.
    rdma
        Whether to use RDMA devices: ``"auto"`` where there are any, ``True`` to insist on them, ``False`` never.
    controller
        By what ranks meet and talk: ``"gloo"``, ``"mpi"``, or ``"auto"`` for MPI where it can use RDMA devices that
        Gloo cannot. Under MPI the function can use ``mpi4py.MPI`` beside Horovod.
    preload
        Modules that the function needs, such as ``["tensorflow", "horovod.tensorflow"]``. They are imported while the
        ranks are still finding each other, and before the function could set variables that they read.
    warm_pool
        Whether processes that have imported ``preload`` are kept on the executors for the next call.
    allow_insecure_transport
        Whether the ranks may talk unencrypted and unauthenticated on a cluster whose session has
        ``spark.authenticate``, ``spark.network.crypto.enabled`` or ``spark.ssl.enabled``.
    spark
        The session to run in; by default the active one.

    Returns
    -------
    list
        What the function returned on each rank, by rank.

    Raises
    ------
    NotEnoughSlotsError
        When the cluster cannot run that many ranks at once.
    ParamError
        When the session wants protection that the ranks do not have, and that is not allowed.
    WorkerFailedError
        When the function failed on some rank; the message begins with the rank and the error that came first.

    Examples
    --------
    >>> def mean_of_ranks():
    ...     import horovod.tensorflow as hvd
    ...     import tensorflow as tf
    ...     hvd.init()
    ...     return float(hvd.allreduce(tf.constant(float(hvd.rank())), op=hvd.Average))
    >>> run(mean_of_ranks, num_proc=2)  # doctest: +SKIP
    [0.5, 0.5]
    """
    # Here, because `import hvdspark` must do without them where nothing is launched, as in Airflow's environment.
    import cloudpickle

    from hvdspark.launch.barrier import run_barrier
    from hvdspark.launch.options import LaunchOptions
    from hvdspark.launch.slots import count_slots
    from hvdspark.worker.job import Job

    session = spark or active_session()
    options = LaunchOptions(
        controller=controller,
        nics=tuple(nics),
        rdma=rdma,
        env=dict(env or {}),
        start_timeout_s=start_timeout,
        stall_timeout_s=stall_timeout_s,
        slots_timeout_s=slots_timeout_s,
        preload=tuple(preload),
        warm_pool=warm_pool,
        allow_insecure_transport=allow_insecure_transport,
    )
    ranks = count_slots(session) if num_proc is None else num_proc
    payload = cloudpickle.dumps(Job(fn, tuple(args), dict(kwargs or {})))
    # The answers came through Spark's own channel from processes that this call started.
    return [cloudpickle.loads(answer) for answer in run_barrier(session, ranks, payload, options)]


def active_session() -> SparkSession:
    """Return the active Spark session.

    Raises
    ------
    LaunchError
        When there is none, or it is a Spark Connect session, which has no barrier launch of its own yet.
    """
    from pyspark.sql import SparkSession

    session = SparkSession.getActiveSession()
    if session is None:
        raise LaunchError("there is no active Spark session; make one with SparkSession.builder.getOrCreate()")
    return session
