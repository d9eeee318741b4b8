"""``hvdspark score``: batch inference with a saved or promoted model."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from hvdspark.cli.jobs import JobCommand, failure_of, report, spark_session, start_logging, terminable

if TYPE_CHECKING:
    from hvdspark.estimators.job.scoring import ScoreJob, ScoreResult


@click.command(cls=JobCommand)
@click.option(
    "--model", required=True, metavar="PATH|alias:NAME", help="A saved model, a run's model.keras, or alias:champion."
)
@click.option("--store", envvar="HVDSPARK_STORE", metavar="URL", help="The Store of the alias.  [env: HVDSPARK_STORE]")
@click.option("--input", "path", metavar="PATH", help="Rows to score.")
@click.option("--input-format", metavar="NAME", help="Of the input: any reader of Spark's (default: parquet).")
@click.option("--option", "pairs", multiple=True, metavar="KEY=VALUE", help="An option of the reader, as header=true.")
@click.option("--schema", metavar="DDL", help="The input's columns, where its format does not tell them.")
@click.option("--table", metavar="NAME", help="Score a table instead of files.")
@click.option("--sql", metavar="QUERY", help="Score what a query gives instead of files.")
@click.option("--output", required=True, metavar="PATH", help="Where the scored rows go.")
@click.option("--output-format", default="parquet", show_default=True, help="Any writer of Spark's.")
@click.option(
    "--mode",
    type=click.Choice(["error", "overwrite", "append"]),
    default="error",
    show_default=True,
    help="What to do where the output is there already.",
)
@click.option("--columns", metavar="A,B", help="Columns to keep, of the input's and the model's (default: all).")
@click.pass_context
def score(context: click.Context, /, **options: Any) -> None:
    """Score rows with a saved model, and write them with its outputs.

    The last line of standard output is one JSON object. Exit codes are those of `hvdspark train`.
    """
    start_logging()
    result = _run(options)
    click.echo(result.to_json())
    context.exit(result.exit_code)


def _run(options: dict[str, Any]) -> ScoreResult:
    from hvdspark.estimators.job.scoring import ScoreResult

    started = time.time()
    try:
        with terminable():
            job = _job(options)
            # An alias that is not there is found out before Spark is started.
            job.entry()
            with spark_session("hvdspark score", {}, []) as session:
                return job.run(session)
    except (Exception, KeyboardInterrupt) as exc:  # noqa: BLE001 - whatever it is, it has an exit code
        report(exc)
        return ScoreResult(model=options["model"], **failure_of(exc, started))


def _job(options: dict[str, Any]) -> ScoreJob:
    from hvdspark.estimators.job.config import input_of
    from hvdspark.estimators.job.places import open_store
    from hvdspark.estimators.job.scoring import ScoreJob

    names = ("path", "table", "sql", "schema")
    given = {name: options[name] for name in names if options[name] is not None}
    if options["input_format"] is not None:
        given["format"] = options["input_format"]
    return ScoreJob(
        model=options["model"],
        source=input_of(given, options["pairs"]),
        output=options["output"],
        output_format=options["output_format"],
        mode=options["mode"],
        columns=tuple(name.strip() for name in (options["columns"] or "").split(",") if name.strip()),
        store=None if options["store"] is None else open_store(options["store"]),
    )
