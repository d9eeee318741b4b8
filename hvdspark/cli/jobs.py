"""What the commands share that run as jobs: a Spark session, signals, and one line of JSON at the end."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click

from hvdspark.cli.exits import Exit
from hvdspark.errors import HvdSparkError, text_of
from hvdspark.recording import first_line

logger = logging.getLogger(__name__)

# As Spark names its errors: "[FAILED_READ_FILE.NO_HINT] Encountered error while reading file …".
_NAMED = re.compile(r"\[[A-Z][A-Z_.]+\] .*")

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class JobCommand(click.Command):
    """A command that ends with a line of JSON, also where its arguments are wrong."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Read the arguments; what is wrong with them is exit code 64."""
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.UsageError as exc:
            from hvdspark.estimators.job.result import JobResult

            cause = exc.format_message()
            click.echo(JobResult(None, "failed", Exit.USAGE, cause=cause, error="UsageError").to_json())
            # Click's own is 2.
            raise _WrongUsageError(cause, exc.ctx) from exc


class _WrongUsageError(click.UsageError):
    exit_code = Exit.USAGE


def start_logging() -> None:
    """Send the log to standard error: standard output is for the result."""
    logging.basicConfig(level=logging.INFO, format=_FORMAT, stream=sys.stderr)
    for name in ("py4j", "absl", "fsspec"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM end a block as Ctrl-C does, so that it can say what became of it; a second one kills."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, _: Any) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt(signal.Signals(number).name)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def spark_session(name: str, settings: Mapping[str, Any], py_files: list[Path]) -> Iterator[Any]:
    """Provide a Spark session; one that is there already is taken, and not stopped.

    Parameters
    ----------
    name
        The application's, unless ``spark-submit`` has given it one.
    settings
        Spark's settings, where ``spark-submit`` has given none.
    py_files
        Modules to send to the executors.
    """
    from pyspark import SparkConf, SparkContext
    from pyspark.sql import SparkSession

    session = SparkSession.getActiveSession()
    is_own = session is None
    if session is None:
        # Only with the JVM at hand does a SparkConf know what spark-submit was told.
        SparkContext._ensure_initialized()
        conf = SparkConf()
        for key, value in {"spark.app.name": name, **settings}.items():
            conf.setIfMissing(key, str(value).lower() if isinstance(value, bool) else str(value))
        session = SparkSession.builder.config(conf=conf).getOrCreate()
        if "PYSPARK_PYTHON" not in os.environ and conf.get("spark.pyspark.python") is None:
            # The executors are to run this very Python, not whatever python3 they find.
            session.sparkContext.pythonExec = sys.executable
    try:
        for path in py_files:
            session.sparkContext.addPyFile(str(path))
        yield session
    finally:
        if is_own:
            # After a signal its JVM may be gone already.
            with contextlib.suppress(Exception):
                session.stop()


def report(exc: BaseException) -> None:
    """Log what ended a job: of this library's own errors the message says all, others show where they come from."""
    if isinstance(exc, HvdSparkError):
        logger.error("%s: %s", type(exc).__name__, exc)
    elif isinstance(exc, KeyboardInterrupt):
        logger.error("interrupted%s", f" by {exc}" if str(exc) else "")
    else:
        logger.error("%s", text_of(exc), exc_info=exc)


def cause_of(exc: BaseException) -> str:
    """Return the line that says why."""
    if isinstance(exc, KeyboardInterrupt):
        return f"interrupted{f' by {exc}' if str(exc) else ''}"
    text = text_of(exc)
    lines = text.strip().splitlines()
    if not isinstance(exc, HvdSparkError) and "Traceback" in text:
        # Spark puts the traceback of a Python task into its message: its last line is what was raised.
        raised = [line for line in lines if line and not line.startswith((" ", "\t"))]
        return raised[-1] if raised else lines[-1]
    if len(lines) > 1 and lines[0].startswith("An error occurred while calling"):
        # Java's errors come with the call that they ended, and with their causes: the last that has a name says why.
        named: list[str] = _NAMED.findall(text)
        return named[-1] if named else lines[1].removeprefix(": ")
    return first_line(exc)


def failure_of(exc: BaseException, started: float) -> dict[str, Any]:
    """Describe what ended a job, as its result has it.

    Parameters
    ----------
    exc
        What ended it.
    started
        When it began, in seconds since the epoch.
    """
    # Late: errors of the command line need no Spark.
    from hvdspark.cli.exits import exit_code

    code = exit_code(exc)
    return {
        "state": "interrupted" if code == Exit.INTERRUPTED else "failed",
        "exit_code": code,
        "cause": cause_of(exc),
        "error": type(exc).__name__,
        "seconds": round(time.time() - started, 3),
    }
