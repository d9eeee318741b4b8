"""The command ``hvdspark``. Each command is a module of its own, imported when it is called."""

from __future__ import annotations

import importlib

import click

# A command and its address.
_COMMANDS = {
    "doctor": "hvdspark.cli.doctor:doctor",
    "explain": "hvdspark.cli.explain:explain",
    "info": "hvdspark.cli.info:info",
    "models": "hvdspark.cli.models:models",
    "report": "hvdspark.cli.report:report",
    "runs": "hvdspark.cli.runs:runs",
    "tensorboard": "hvdspark.cli.tensorboard:tensorboard",
    "score": "hvdspark.cli.score:score",
    "train": "hvdspark.cli.train:train",
}


class _LateGroup(click.Group):
    """A group whose commands are imported when they are asked for: not all of them need Spark."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - the name is click's
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:  # noqa: ARG002
        if name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


@click.group(cls=_LateGroup)
@click.version_option(package_name="hvdspark")
def main() -> None:
    """Distributed deep learning inside Spark ML."""
