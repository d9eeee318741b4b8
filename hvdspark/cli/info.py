"""``hvdspark info``: the versions of the stack, and what Horovod was built with."""

from __future__ import annotations

import json
import sys

import click

from hvdspark.doctor.probe import load_horovod
from hvdspark.versions import installed_versions


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def info(as_json: bool) -> None:
    """Print the versions of the stack and what Horovod was built with.

    Ends with exit code 1 when Horovod cannot be loaded.
    """
    versions = installed_versions()
    built, library, error = load_horovod()
    if as_json:
        found = {"versions": versions, "horovod_built": built, "mpi_library": library, "error": error}
        click.echo(json.dumps(found))
    else:
        width = max(len(name) for name in versions)
        for name, version in versions.items():
            click.echo(f"{name:<{width}}  {version}")
        for name, present in built.items():
            click.echo(f"horovod with {name:<5} {'yes' if present else 'no'}")
    if error:
        click.echo(f"Horovod cannot be loaded: {error}", err=True)
        sys.exit(1)
