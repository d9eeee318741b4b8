"""``HvdSparkTrainOperator``: ``hvdspark train`` as a task of Airflow.

For Airflow's own environment: it needs Airflow and its Spark provider, and neither pyspark nor a framework, which
``spark-submit`` finds where it runs.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import psutil
from airflow.providers.apache.spark.hooks.spark_submit import SparkSubmitHook
from airflow.providers.apache.spark.operators.spark_submit import SparkSubmitOperator
from airflow.providers.common.compat.sdk import AirflowException, AirflowFailException

from hvdspark.errors import StoreError
from hvdspark.runs import RESULT, run_folder
from hvdspark.store import Store

if TYPE_CHECKING:
    from airflow.sdk import Context

# Exit codes of `hvdspark train` after which another try would end the same way: usage, data, for good, configuration.
_FINAL = frozenset({64, 65, 70, 78})

# The Airflow process that tells a task to end kills it five seconds later.
_GRACE_S, _ENDING_S = 3.0, 1.0

_SLUG_LENGTH = 120


class HvdSparkTrainOperator(SparkSubmitOperator):  # type: ignore[misc] # Airflow is not where types are checked
    """Run ``hvdspark train`` by ``spark-submit``; the task's XCom is what the command prints as its last line.

    The run is named after the task of this DAG run, not after the try: a retry goes on where the try before was
    interrupted, and what has finished is not trained again. Failures that another try cannot mend (usage, data,
    configuration, the user's own code) fail the task at once, others are left to its ``retries``. The message is the
    root cause as the command tells it, such as ``rank 1 on h: ValueError: …``.

    Parameters
    ----------
    config
        The job file, where the driver finds it. Templated, as all that follows but ``application``.
    overrides
        Values that replace those of the job file, by their dotted names; ``{"estimator.epochs": 3}`` is
        ``--set estimator.epochs=3``. What is no string is written as JSON.
    run_id
        The run's name; by default what :func:`run_name` makes of the task's.
    since, until
        The window of the data, as ``hvdspark train`` takes it.
    warm_start
        The alias or run whose model the training begins with.
    store
        The address of the Store, instead of the job file's. Needed where the driver's output does not reach Airflow
        (``deploy_mode="cluster"``): the result is then read from the run's folder, so Airflow's host must reach it.
    application
        The program that is submitted.
    application_args
        More arguments for ``hvdspark train``.
    name
        What Spark calls the application.
    kwargs
        Everything that ``SparkSubmitOperator`` takes (``conn_id``, ``conf``, ``env_vars``, ``archives``, …).
    """

    template_fields: Sequence[str] = (
        *SparkSubmitOperator.template_fields,
        "config",
        "overrides",
        "run_id",
        "since",
        "until",
        "warm_start",
        "store",
    )

    application_args: Sequence[str] | None

    def __init__(
        self,
        *,
        config: str,
        overrides: Mapping[str, Any] | None = None,
        run_id: str | None = None,
        since: str | None = None,
        until: str | None = None,
        warm_start: str | None = None,
        store: str | None = None,
        application: str,
        name: str = "hvdspark {{ ti.dag_id }}.{{ ti.task_id }}",
        **kwargs: Any,
    ) -> None:
        super().__init__(application=application, name=name, **kwargs)
        self.config = config
        self.overrides = overrides
        self.run_id = run_id
        self.since = since
        self.until = until
        self.warm_start = warm_start
        self.store = store

    def execute(self, context: Context) -> dict[str, Any]:
        """Train; returns the result.

        Raises
        ------
        AirflowFailException
            When another try would fail as well.
        AirflowException
            When it may succeed.
        """
        run_id = self.run_id or run_name(context)
        self.application_args = [*self._arguments(run_id), *(self.application_args or ())]
        earlier = self._published(run_id)
        try:
            super().execute(context)
        except (AirflowException, RuntimeError) as exc:
            result = self._result(run_id, earlier)
            if result is None:
                raise
            raise self._failure(context, run_id, result) from exc
        result = self._result(run_id)
        if result is None:
            raise AirflowException(
                f"spark-submit ended well, but there is no result of the run {run_id}: the application must be"
                " `hvdspark train`; where its output does not reach Airflow (deploy_mode='cluster'), give `store`"
            )
        if result["exit_code"] != 0:  # in cluster mode spark-submit need not tell
            raise self._failure(context, run_id, result)
        return result

    def _arguments(self, run_id: str) -> list[str]:
        options = {"--store": self.store, "--since": self.since, "--until": self.until, "--warm-start": self.warm_start}
        found = ["--config", self.config, "--run-id", run_id]
        for name, value in (self.overrides or {}).items():
            found += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
        for option, value in options.items():
            found += [option, value] if value else []
        return found

    def _result(self, run_id: str, earlier: dict[str, Any] | None = None) -> dict[str, Any] | None:
        """Return what the command printed, or else left in the Store, unless that is what an earlier try left."""
        printed = self._hook.result if isinstance(self._hook, _TrainHook) else None
        published = self._published(run_id)
        return printed or (None if published == earlier else published)

    def _published(self, run_id: str) -> dict[str, Any] | None:
        if not self.store:
            return None
        store = Store.create(self.store)
        try:
            return store.read_json(run_folder(run_id), RESULT)
        except StoreError as exc:
            # Where the driver's output reaches Airflow, nobody need read the Store from here.
            self.log.warning("cannot look for the result of %s: %s", run_id, exc)
            return None

    def _failure(self, context: Context, run_id: str, result: Mapping[str, Any]) -> AirflowException:
        """Make the error to raise of a result; the XCom keeps it, for callbacks and for tasks that run all the same."""
        context["ti"].xcom_push(key="return_value", value=result)
        code = result["exit_code"]
        kind = AirflowFailException if code in _FINAL else AirflowException
        return kind(f"{result.get('cause') or 'the training failed'} (run {run_id}, exit code {code})")

    def _get_hook(self) -> SparkSubmitHook:
        return _TrainHook.like(super()._get_hook())


class _TrainHook(SparkSubmitHook):  # type: ignore[misc] # as above
    """The provider's hook, which keeps the command's result, and ends the driver in an orderly way."""

    result: dict[str, Any] | None = None

    @classmethod
    def like(cls, hook: SparkSubmitHook) -> _TrainHook:
        """Make one with all that another was given."""
        made = cls.__new__(cls)
        made.__dict__.update(hook.__dict__)
        return made

    def submit(self, application: str = "", **kwargs: Any) -> str | None:
        """Submit as the provider does, in a process group, which :meth:`on_kill` can end whole."""
        driver_id: str | None = super().submit(application, start_new_session=True, **kwargs)
        return driver_id

    def on_kill(self) -> None:
        """End the driver, and with it the Spark job: first it is asked, so that it can say what becomes of its run.

        The provider kills Java alone, at once: the Python that it runs would go on until it next needs Spark.
        """
        if self._submit_sp is not None and self._submit_sp.poll() is None:
            # What spark-submit started ends it by ending itself. Only Popen may reap that: else its exit code is lost.
            started = [process for process in _group(self._submit_sp.pid) if process.pid != self._submit_sp.pid]
            _signal(started, signal.SIGTERM)
            _, alive = psutil.wait_procs(started, timeout=_GRACE_S)
            _signal(alive, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._submit_sp.wait(_ENDING_S if started else 0)
        super().on_kill()

    def _process_spark_submit_log(self, itr: Iterator[str]) -> None:
        super()._process_spark_submit_log(self._noting(itr))

    def _noting(self, lines: Iterator[str]) -> Iterator[str]:
        for line in lines:
            self.result = _result_in(line) or self.result
            yield line


def run_name(context: Context) -> str:
    """Name the run of a task: the same for all its tries, another one for any other task or DAG run.

    Parameters
    ----------
    context
        The task's, as ``execute`` gets it.

    Returns
    -------
    str
        Letters, digits, ``-``, ``_`` and ``.``, since names of the Store have no colons as Airflow's have; at the end
        a digest of the exact names.

    Examples
    --------
    The task ``train`` of the DAG ``retrain`` at 2026-11-27 is
    ``retrain-train-scheduled__2026-11-27T00-00-00-00-00-5b6e0c4f62a1``.
    """
    task = context["ti"]
    parts = [task.dag_id, task.task_id, context["dag_run"].run_id]
    if task.map_index >= 0:
        parts.append(str(task.map_index))
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]
    slug = re.sub(r"[^A-Za-z0-9_.]+", "-", "-".join(parts))
    return f"{slug[:_SLUG_LENGTH]}-{digest}".lstrip("-.")


def _result_in(line: str) -> dict[str, Any] | None:
    """Find the command's result in a line of the output: standard error flows in between, as Java's log does."""
    start = line.find('{"')
    if start < 0:
        return None
    try:
        found, _ = json.JSONDecoder().raw_decode(line, start)
    except ValueError:
        return None
    return found if isinstance(found, dict) and found.keys() >= {"run_id", "state", "exit_code"} else None


def _group(leader: int) -> list[psutil.Process]:
    """List the processes of a group."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgid(process.pid) == leader:
                found.append(process)
    return found


def _signal(processes: Sequence[psutil.Process], number: int) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
