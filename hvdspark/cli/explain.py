"""``hvdspark explain``: what an error means, what usually causes it, and what to do."""

from __future__ import annotations

import re
from importlib import resources

import click

from hvdspark.errors import closest

_HEADING = re.compile(r"^#+ (\w+)$", re.MULTILINE)


def entries() -> dict[str, str]:
    """Return what is known of errors, by the name of their class."""
    text = (resources.files("hvdspark") / "troubleshooting.md").read_text(encoding="utf-8")
    found = list(_HEADING.finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)]
    return {match[1]: text[match.end() : end].strip() for match, end in zip(found, ends, strict=True)}


@click.command()
@click.argument("name", required=False)
def explain(name: str | None) -> None:
    """Say what an error means, what usually causes it, and what to do.

    NAME is that of its class, as in NotEnoughSlotsError; without it the classes are listed.
    """
    known = entries()
    if name is None:
        click.echo("\n".join(known))
        return
    own = name.rpartition(".")[2]
    if own not in known:
        raise click.BadParameter(f"'{name}' is no error of hvdspark.{closest(own, known)}", param_hint="NAME")
    click.echo(f"{own}\n\n{known[own]}")
