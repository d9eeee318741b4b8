"""The Spark session of an examination."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from hvdspark.errors import LaunchError, ParamError, telling_line

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

PYTHON = "spark.pyspark.python"

_STANDALONE = "spark://"
_CONNECT_S = 5.0


@contextlib.contextmanager
def session_on(cluster: str | None, conf: Mapping[str, str]) -> Iterator[SparkSession]:
    """Provide a session: the active one, or one that is started and stopped.

    Parameters
    ----------
    cluster
        Spark's master; by default what ``spark-submit`` says, or the active session's.
    conf
        Settings of Spark's.

    Raises
    ------
    ParamError
        When the active session is on another cluster.
    LaunchError
        When no session can be had.
    """
    from pyspark.sql import SparkSession

    active = SparkSession.getActiveSession()
    if active is not None:
        if cluster not in (None, active.sparkContext.master):
            raise ParamError(
                f"cluster='{cluster}', but this process has a Spark session on {active.sparkContext.master}; stop it"
                " first, or leave cluster out",
                param="cluster",
            )
        yield active
        return
    if cluster is not None:
        check_answers(cluster)
    quiet = {"spark.ui.showConsoleProgress": "false"}
    builder = SparkSession.builder.appName("hvdspark doctor").config(map={**quiet, **conf})
    try:
        session = (builder if cluster is None else builder.master(cluster)).getOrCreate()
    except Exception as exc:  # Py4J's and Spark's own errors have no common base
        raise LaunchError(
            f"Spark starts no session on {cluster or 'the default master'}: {telling_line(exc).rstrip('.')}."
            " Look at Spark's own log; is there a Java 17 (JAVA_HOME), and a cluster at that address?"
        ) from exc
    try:
        session.sparkContext.setLogLevel("OFF")  # what goes wrong is what is reported
        if PYTHON in conf:
            session.sparkContext.pythonExec = conf[PYTHON]  # as spark-submit does
        yield session
    finally:
        session.stop()


def check_answers(cluster: str) -> None:
    """Check that somebody listens where a standalone master should be: Spark would try for a minute.

    Raises
    ------
    LaunchError
        When nobody does.
    """
    if not cluster.startswith(_STANDALONE):
        return
    errors = []
    for address in cluster.removeprefix(_STANDALONE).split(","):
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host, int(port)), _CONNECT_S).close()
            return
        except (OSError, ValueError) as exc:
            errors.append(f"{address}: {exc}")
    raise LaunchError(
        f"no master answers at {cluster} ({'; '.join(errors)}). Is it running, and is the address the one that its own"
        " page shows?"
    )
