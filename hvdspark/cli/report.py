"""``hvdspark report``: a page about a run."""

from __future__ import annotations

import json
from pathlib import Path

import click

from hvdspark.cli.options import json_option, opened, store_option
from hvdspark.report import write_report


@click.command()
@store_option
@click.option("--run", "run_id", required=True, help="The run's id.")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("report.html"),
    show_default=True,
    help="The page's file.",
)
@json_option
def report(url: str, run_id: str, output: Path, as_json: bool) -> None:
    """Write a page about a run: curves, where the time went, ranks, parameters.

    The page is one file that needs no network. It can be written while the run goes on, and of one that failed.
    """
    with opened(url) as store:
        path = str(write_report(store, run_id, output))
    click.echo(json.dumps({"run_id": run_id, "report": path}) if as_json else path)
