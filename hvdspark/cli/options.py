"""What the commands that look into a Store have in common."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import click

from hvdspark.errors import HvdSparkError
from hvdspark.store import Store

Command = TypeVar("Command", bound=Callable[..., None])


def store_option(command: Command) -> Command:
    """Give a command the option ``--store``, as its argument ``url``."""
    option = click.option(
        "--store",
        "url",
        envvar="HVDSPARK_STORE",
        required=True,
        metavar="URL",
        help="The Store; else HVDSPARK_STORE.",
    )
    return option(command)


def json_option(command: Command) -> Command:
    """Give a command the option ``--json``, as its argument ``as_json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


@contextlib.contextmanager
def opened(url: str) -> Iterator[Store]:
    """Open a Store that is there for a block; what goes wrong ends the command with a message and an exit code."""
    with telling():
        store = Store.create(url)
        store.check_there()
        yield store


@contextlib.contextmanager
def telling() -> Iterator[None]:
    """Have errors of a block end the command with their message, where to read on, and the exit code of their kind."""
    try:
        yield
    except HvdSparkError as exc:
        # Late: it knows Spark's errors too, and most commands end well.
        from hvdspark.cli.exits import exit_code

        click.echo(f"Error: {exc}\nSee {exc.help}.", err=True)
        raise SystemExit(int(exit_code(exc))) from exc
