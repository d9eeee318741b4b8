"""``hvdspark models``: which models are in use, by their aliases; to promote another one, and to go back."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import click

from hvdspark.aliases import AliasEntry, entry_of_run, list_aliases, promote, read_alias, rollback, to_json
from hvdspark.cli.options import json_option, opened, store_option
from hvdspark.cli.tables import table, when
from hvdspark.errors import AliasError, closest


def _expected(what: str) -> Callable[..., Any]:
    return click.option("--expected", metavar="RUN", help=f"{what}; fail where it refers to another one.")


@click.group()
def models() -> None:
    """Say which models are in use, promote others, and go back."""


@models.command("list")
@store_option
@json_option
def list_(url: str, as_json: bool) -> None:
    """List the aliases and what they refer to."""
    with opened(url) as store:
        found = list_aliases(store)
    if as_json:
        click.echo(json.dumps([{"alias": name, **to_json(entry)} for name, entry in found.items()]))
        return
    if not found:
        click.echo(f"no aliases in {store.url}; promote a run: hvdspark models promote champion RUN", err=True)
        return
    rows = [[name, entry.run_id, when(entry.promoted), _metrics(entry.metrics)] for name, entry in found.items()]
    click.echo(table(["alias", "run", "promoted", "metrics"], rows))


@models.command()
@click.argument("alias")
@store_option
@json_option
def show(url: str, as_json: bool, alias: str) -> None:
    """Show what an alias refers to, what it can be rolled back to, and what was rolled back."""
    with opened(url) as store:
        entry = read_alias(store, alias)
        if entry is None:
            hint = closest(alias, list_aliases(store))
            raise AliasError(f"there is no alias '{alias}' in {store.url}.{hint}", alias=alias)
    _print(alias, entry, as_json=as_json)


@models.command("promote")
@click.argument("alias")
@click.argument("run")
@click.option(
    "--model", metavar="ADDRESS", help="Address of a saved model; by default the run's own: of a job its pipeline."
)
@_expected("The run that the alias must refer to still ('' for none)")
@store_option
@json_option
def promote_(url: str, as_json: bool, alias: str, run: str, model: str | None, expected: str | None) -> None:
    """Let an alias refer to the model of a finished run."""
    with opened(url) as store:
        entry = promote(store, alias, entry_of_run(store, run, model), expected)
    _print(alias, entry, as_json=as_json)


@models.command("rollback")
@click.argument("alias")
@_expected("The run to roll back")
@store_option
@json_option
def rollback_(url: str, as_json: bool, alias: str, expected: str | None) -> None:
    """Let an alias refer to its previous model again."""
    with opened(url) as store:
        entry = rollback(store, alias, expected)
    _print(alias, entry, as_json=as_json)


def _print(alias: str, entry: AliasEntry, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"alias": alias, **to_json(entry)}))
        return
    ways = [("in use", entry), *(("before", item) for item in entry.previous)]
    ways += [("rolled back", item) for item in entry.withdrawn]
    rows = [
        [way, item.run_id, when(item.promoted), when(item.rolled_back), _metrics(item.metrics), item.model]
        for way, item in ways
    ]
    click.echo(table([alias, "run", "promoted", "rolled back", "metrics", "model"], rows))


def _metrics(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {number:.6g}" for name, number in metrics.items()) or "-"
