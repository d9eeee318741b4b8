"""Exit codes, in the manner of BSD's ``sysexits.h``, so that a scheduler can tell what to do next."""

from __future__ import annotations

import re
from enum import IntEnum

from py4j.protocol import Py4JError, Py4JJavaError
from pyspark.errors import AnalysisException, IllegalArgumentException, PySparkException

from hvdspark import errors
from hvdspark.errors import (
    JVM_GONE,
    AliasConflictError,
    ConfigError,
    DataError,
    LaunchError,
    LaunchTimeoutError,
    NotEnoughSlotsError,
    RunInProgressError,
    StageLostError,
    StoreError,
    WorkerFailedError,
    text_of,
)


class Exit(IntEnum):
    """What a command of hvdspark ends with.

    Attributes
    ----------
    DONE
        It did what it was asked for, also where a gate kept the model from being promoted.
    USAGE
        The command line is wrong.
    DATA
        The rows cannot be trained on or scored, or are not there.
    FAILED
        It failed for good: the user's code or the training itself raised an error. The same again will fail again.
    TRY_AGAIN
        Hosts were lost, slots are missing, the Store is out of reach, or another driver is at the run: the same
        command may succeed later.
    CONFIG
        The configuration cannot work, be it that of the job or of the cluster.
    INTERRUPTED
        By a signal, or because Spark's jobs were cancelled.
    """

    DONE = 0
    USAGE = 64
    DATA = 65
    FAILED = 70
    TRY_AGAIN = 75
    CONFIG = 78
    INTERRUPTED = 130


# The first that fits decides.
_BY_CLASS: tuple[tuple[type[BaseException], Exit], ...] = (
    (KeyboardInterrupt, Exit.INTERRUPTED),
    (ConfigError, Exit.CONFIG),
    (DataError, Exit.DATA),
    (NotEnoughSlotsError, Exit.TRY_AGAIN),
    (LaunchTimeoutError, Exit.TRY_AGAIN),
    (RunInProgressError, Exit.TRY_AGAIN),
    (StoreError, Exit.TRY_AGAIN),
    (AliasConflictError, Exit.TRY_AGAIN),
    # Ranks that cannot come up as the cluster or the estimator is set: GPUs, MPI, interfaces.
    (LaunchError, Exit.CONFIG),
    # Of Spark's own: stages, tables and columns that do not go together.
    (AnalysisException, Exit.CONFIG),
    (IllegalArgumentException, Exit.CONFIG),
)

# What Spark says when it was not the program's fault.
_LOST = (JVM_GONE, "ExecutorLostFailure", "SparkContext was shut down", "stopped SparkContext", "FetchFailed")
# And when it was the rows' fault: files that are damaged, and values that cannot be what the query makes of them, which
# are the class 22 of SQL's states.
_BAD_DATA = re.compile(r"\[(FAILED_READ_FILE|CANNOT_READ_FILE_FOOTER|CAST_INVALID_INPUT)\b|SQLSTATE: 22")
# Unless the files could not be reached.
_OUT_OF_REACH = re.compile(
    r"java\.net\.(Connect|Socket|SocketTimeout|NoRouteToHost)Exception|ConnectTimeoutException|BlockMissingException"
)
_CANCELLED = ("cancelled", "canceled")


def exit_code(exc: BaseException) -> Exit:
    """Return the exit code for an error.

    Parameters
    ----------
    exc
        What ended the command.

    Returns
    -------
    Exit
        :attr:`Exit.FAILED` for what is not known to pass by itself.
    """
    if isinstance(exc, StageLostError):
        # Spark's own way of stopping a program is to cancel its jobs.
        if exc.is_cancelled:
            return Exit.INTERRUPTED
        if exc.is_passing:
            return Exit.TRY_AGAIN
        return _of_spark(exc) if exc.__cause__ is None else exit_code(exc.__cause__)
    if isinstance(exc, WorkerFailedError):
        return Exit.TRY_AGAIN if exc.is_passing else Exit.FAILED
    if isinstance(exc, LaunchError) and exc.is_passing:
        return Exit.TRY_AGAIN
    if isinstance(exc, Py4JJavaError | PySparkException) and _is_of_data(text_of(exc)):
        return Exit.DATA
    for cls, code in _BY_CLASS:
        if isinstance(exc, cls):
            return code
    return _of_spark(exc)


def _is_of_data(text: str) -> bool:
    """Whether Spark says that it cannot read the rows, or that they hold what cannot be."""
    return _BAD_DATA.search(text) is not None and not _is_passing(text)


def _is_passing(text: str) -> bool:
    """Whether Spark says that it has lost something, or cannot reach it."""
    return any(word in text for word in _LOST) or _OUT_OF_REACH.search(text) is not None


def _of_spark(exc: BaseException) -> Exit:
    """Tell by its words whether Spark lost something; errors of user functions are the program's own."""
    text = text_of(exc)
    # What hvdspark raised within a task comes back as the last line of a Python traceback.
    raised = re.findall(r"^hvdspark\.errors\.(\w+):", text, re.MULTILINE)
    if raised and issubclass(getattr(errors, raised[-1], Exception), ConfigError | DataError):
        return exit_code(getattr(errors, raised[-1])(""))
    if isinstance(exc, Py4JJavaError | PySparkException):
        if any(word in text for word in _CANCELLED) and "Job" in text:
            return Exit.INTERRUPTED
        is_own = "PythonException" in text or "Traceback" in text
        return Exit.TRY_AGAIN if _is_passing(text) and not is_own else Exit.FAILED
    # Without an answer from the JVM: it is gone.
    is_gone = isinstance(exc, Py4JError | ConnectionError)
    return Exit.TRY_AGAIN if is_gone else Exit.FAILED
