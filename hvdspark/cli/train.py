"""``hvdspark train``: a training job from a configuration file."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hvdspark.cli.jobs import JobCommand, failure_of, report, spark_session, start_logging, terminable

if TYPE_CHECKING:
    from hvdspark.estimators.job.result import JobResult
    from hvdspark.estimators.job.training import TrainJob

logger = logging.getLogger(__name__)


@click.command(cls=JobCommand)
@click.option("--config", "path", required=True, metavar="FILE", help="The job, as YAML.")
@click.option(
    "--set", "assignments", multiple=True, metavar="KEY=VALUE",
    help="Replace a value of the file: input.path=/data, estimator.epochs=3, or batch_size=512 for short.",
)  # fmt: skip
@click.option("--store", envvar="HVDSPARK_STORE", metavar="URL", help="The Store.  [env: HVDSPARK_STORE]")
@click.option("--run-id", metavar="ID", help="Name of the run. The same again goes on, or gives the finished result.")
@click.option("--since", metavar="BOUND", help="Take rows from here on, by the column of input.window.")
@click.option("--until", metavar="BOUND", help="Take rows before this.")
@click.option("--warm-start", metavar="ALIAS|RUN|PATH", help="Begin with the weights of a model, such as champion.")
@click.option("--check", is_flag=True, help="Check what can be checked without Spark, and end.")
@click.pass_context
def train(context: click.Context, /, check: bool, **options: Any) -> None:
    """Train, evaluate and promote a model as a configuration file describes.

    The last line of standard output is one JSON object, which is also left as result.json in the run. Exit codes: 0
    done (also where the model was not promoted), 64 usage, 65 bad data, 70 failed for good, 75 try again, 78 bad
    configuration, 130 interrupted.
    """
    start_logging()
    result = _Command(**options).run(check_only=check)
    click.echo(result.to_json())
    context.exit(result.exit_code)


class _Command:
    """One call of the command."""

    def __init__(self, path: str, assignments: tuple[str, ...], **options: str | None) -> None:
        self._path, self._assignments, self._options = path, assignments, options
        self._job: TrainJob | None = None
        self._started = time.time()

    def run(self, *, check_only: bool) -> JobResult:
        """Do the job; whatever ends it becomes a result."""
        try:
            with terminable():
                return self._run(check_only=check_only)
        except (Exception, KeyboardInterrupt) as exc:  # noqa: BLE001 - whatever it is, it has an exit code
            report(exc)
            return self._failed(exc, check_only=check_only)

    def _run(self, *, check_only: bool) -> JobResult:
        from hvdspark.estimators.job.building import Building
        from hvdspark.estimators.job.config import load_config
        from hvdspark.estimators.job.entry import files_in, look_in
        from hvdspark.estimators.job.places import open_store
        from hvdspark.estimators.job.result import JobResult
        from hvdspark.estimators.job.training import TrainJob

        replaced: dict[tuple[str | int, ...], str | None] = {
            ("store",): self._options["store"],
            ("run_id",): self._options["run_id"],
            ("warm_start",): self._options["warm_start"],
            ("input", "window", "since"): self._options["since"],
            ("input", "window", "until"): self._options["until"],
        }
        config, document = load_config(self._path, self._assignments, replaced)
        folder = Path(self._path).resolve().parent
        look_in(folder)
        store = open_store(config.store)
        self._job = TrainJob(config, document, store)
        found = None if check_only else self._job.finished()
        if found is not None:
            return found
        building = Building(config, document)
        if check_only:
            skipped = building.check(store)
            cause = f"not checked, for want of Spark: {'; '.join(skipped)}" if skipped else None
            logger.info("the configuration is right as far as it was checked%s", f"; {cause}" if cause else "")
            return JobResult(config.run_id, "checked", 0, cause=cause)
        py_files = files_in(folder, *config.addresses)
        with spark_session(f"hvdspark {self._job.run_id}", config.spark, py_files) as session:
            return self._job.run(session, building)

    def _failed(self, exc: BaseException, *, check_only: bool) -> JobResult:
        from hvdspark.errors import RunInProgressError
        from hvdspark.estimators.job.result import JobResult

        is_other = isinstance(exc, RunInProgressError)
        failure = failure_of(exc, self._started)
        if is_other:
            failure["state"] = "running"
        result = JobResult(self._options["run_id"] if self._job is None else self._job.run_id, **failure)
        # The run of another driver is its own to describe; one that never began leaves nothing, unless it was named.
        is_own = not is_other and not check_only
        if self._job is not None and is_own and (self._options["run_id"] or self._job.has_begun):
            self._job.leave(result)
        return result
