"""``hvdspark doctor``: what is wrong with a cluster, and what to do about it."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Iterable

import click

from hvdspark.doctor import Examination, Finding, examine
from hvdspark.doctor.session import session_on
from hvdspark.errors import HvdSparkError, LaunchError, telling_line
from hvdspark.launch.control import CONTROLLERS
from hvdspark.store import Store

_COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


def _settings(_: click.Context, __: click.Parameter, texts: tuple[str, ...]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    for name, is_pair, _value in pairs:
        if not (name and is_pair):
            raise click.BadParameter(f"'{name}' is no setting: write name=value, as in spark.executor.memory=2g")
    return {name: value for name, _, value in pairs}


@click.command()
@click.option("--cluster", metavar="MASTER", help="Spark's master, as in spark://host:7077; else spark-submit's.")
@click.option("--store", metavar="URL", envvar="HVDSPARK_STORE", help="The Store that trainings use.")
@click.option("--num-proc", type=click.IntRange(1), help="Ranks that trainings will have; else as many as fit.")
@click.option("--controller", type=click.Choice(CONTROLLERS), default="gloo", show_default=True)
@click.option("--nic", "nics", multiple=True, help="Network interface that ranks may use; may be repeated.")
@click.option("--conf", metavar="NAME=VALUE", multiple=True, callback=_settings, help="A setting of Spark's.")
@click.option("--timeout", "timeout_s", type=click.FloatRange(10), default=120.0, show_default=True, metavar="SECONDS")
@click.option("--allow-insecure-transport", is_flag=True, help="Ranks may talk unprotected, as in run().")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(
    *,
    cluster: str | None,
    store: str | None,
    num_proc: int | None,
    controller: str,
    nics: tuple[str, ...],
    conf: dict[str, str],
    timeout_s: float,
    allow_insecure_transport: bool,
    as_json: bool,
) -> None:
    """Look for what is wrong with a cluster, and say what to do.

    Examines every executor in a small barrier job, and has all ranks average arrays by Horovod. Ends with exit code 1
    when there are errors.
    """
    try:
        place = None if store is None else Store.create(store)
        with session_on(cluster, conf) as spark:
            found = examine(
                spark,
                store=place,
                num_proc=num_proc,
                controller=controller,
                nics=nics,
                allow_insecure_transport=allow_insecure_transport,
                timeout_s=timeout_s,
            )
    except HvdSparkError as exc:
        check = "session" if isinstance(exc, LaunchError) else "settings"
        found = Examination((Finding(check, "error", "driver", str(exc), f"See {exc.help}."),), {})
    except Exception as exc:  # noqa: BLE001 - Spark's own errors are of many kinds
        click.echo(traceback.format_exc(), err=True)
        remedy = "What Spark or Java says on standard error tells more."
        found = Examination((Finding("session", "error", "driver", telling_line(exc), remedy),), {})
    if as_json:
        click.echo(json.dumps(found.to_plain()))
    else:
        _show(found)
    sys.exit(1 if found.severity == "error" else 0)


def _show(found: Examination) -> None:
    """Print the findings by where they are, with what to do below those that are not well."""
    for where in dict.fromkeys(finding.where for finding in found.findings):
        click.secho(where, bold=True)
        for finding in _of(where, found.findings):
            mark = click.style(f"{finding.severity:<7}", fg=_COLOURS[finding.severity])
            click.echo(f"  {mark}  {finding.check:<9}  {finding.found}")
            if finding.remedy:
                click.echo(f"{'':<22}-> {finding.remedy}")
    counts = [f"{count} {name}{'s' * (count > 1)}" for name in ("error", "warning") if (count := found.count(name))]
    click.echo(", ".join(counts) or "nothing is wrong")


def _of(where: str, findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.where == where]
