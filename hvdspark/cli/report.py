"""``hvdspark report``: a page about a run."""

from __future__ import annotations

import json
from pathlib import Path

import click

from hvdspark.errors import HvdSparkError
from hvdspark.report import write_report
from hvdspark.store import Store


@click.command()
@click.option("--store", required=True, envvar="HVDSPARK_STORE", help="The Store's address [env: HVDSPARK_STORE].")
@click.option("--run", "run_id", required=True, help="The run's id.")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("report.html"),
    show_default=True,
    help="The page's file.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def report(store: str, run_id: str, output: Path, as_json: bool) -> None:
    """Write a page about a run: curves, where the time went, ranks, parameters.

    The page is one file that needs no network. It can be written while the run goes on, and of one that failed.
    """
    try:
        path = str(write_report(Store.create(store), run_id, output))
    except HvdSparkError as exc:
        raise click.ClickException(str(exc)) from exc
    click.echo(json.dumps({"run_id": run_id, "report": path}) if as_json else path)
