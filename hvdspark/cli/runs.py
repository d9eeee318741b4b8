"""``hvdspark runs``: the runs in a Store, to list, show, compare, take the best of, and clean up."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

import click

from hvdspark.cli.options import json_option, opened, store_option
from hvdspark.cli.tables import table, value, when
from hvdspark.history import by_metric
from hvdspark.launch.memory import show_bytes
from hvdspark.metrics import Mode
from hvdspark.plain import to_json
from hvdspark.registry import SideBySide, best_run, compare_runs, flatten, list_runs, show_run
from hvdspark.report.words import duration
from hvdspark.retention import gc_runs
from hvdspark.runs import RunRecord

_AGE = re.compile(r"(\d+(?:\.\d+)?)([smhdw])")
_CAUSE_WIDTH = 60
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def _seconds(_ctx: click.Context, _param: click.Parameter, given: str | None) -> float | None:
    """Read a time such as ``30d``."""
    if given is None:
        return None
    found = _AGE.fullmatch(given)
    if found is None:
        raise click.BadParameter(f"'{given}' is no time; give a number and a unit: 90m, 12h, 30d or 4w")
    return float(found[1]) * _SECONDS[found[2]]


@click.group()
def runs() -> None:
    """Find, compare and clean up the runs in a Store."""


@runs.command("list")
@click.option("--state", type=click.Choice(["running", "finished", "failed", "interrupted", "damaged"]))
@click.option("--last", type=click.IntRange(min=1), metavar="N", help="Only the newest N.")
@store_option
@json_option
def list_(url: str, as_json: bool, state: str | None, last: int | None) -> None:
    """List the runs, the newest first."""
    with opened(url) as store:
        records = [record for record in list_runs(store) if state in (None, record.state)][:last]
    if as_json:
        _print_json([record.to_json() for record in records])
        return
    if not records:
        click.echo(f"no runs in {store.url}", err=True)
        return
    # What most of them have to show, the losses before other metrics.
    names = list(dict.fromkeys(name for record in records for name in record.metrics))
    shown = sorted(names, key=lambda name: (not name.endswith("loss"), names.index(name)))[:4]
    head = ["RUN", "STATE", "STARTED", "TOOK", "ROWS", "RANKS", *shown, "CAUSE"]
    click.echo(table(head, [_row(record, shown) for record in records]))


@runs.command()
@click.argument("run_id")
@store_option
@json_option
def show(url: str, as_json: bool, run_id: str) -> None:
    """Show all that is known of a run."""
    with opened(url) as store:
        details = show_run(store, run_id)
    record = details.record
    if as_json:
        history = [epoch.to_plain() for epoch in details.epochs]
        more = {"history": history, "aliases": details.aliases, "size_bytes": details.size_bytes}
        _print_json({**record.to_json(), **more})
        return
    attempts = [
        f"{when(attempt.started)}, {_took(attempt.started, attempt.ended)}"
        + (f", {attempt.ranks} ranks" if attempt.ranks else "")
        + (f": {attempt.cause}" if attempt.cause else "")
        for attempt in record.attempts
    ]
    facts = {
        "run": record.run_id,
        "state": record.state + (f": {record.cause}" if record.cause else ""),
        "started": f"{when(record.started)}, took {_took(record.started, record.ended)}",
        "attempts": attempts,
        "promoted": _promoted(record),
        "aliases": list(details.aliases),
        "size": show_bytes(details.size_bytes),
        "hosts": [f"rank {place.rank}: {place.host}, local rank {place.local_rank}" for place in record.hosts],
        "network": record.network,
        "mlflow": record.mlflow_run_id or "",
    }
    for name, found in facts.items():
        lines = found if isinstance(found, list) else [found]
        for place, line in enumerate(filter(None, lines)):
            click.echo(f"{name if place == 0 else '':<9} {line}")
    _section("metrics" + (f" of epoch {record.epoch}" if record.epoch else ""), record.metrics)
    _section("metrics of the held-out rows", record.held_out)
    _section("phases", {name: duration(seconds) for name, seconds in record.phases.items()})
    _section("artefacts", record.artefacts)
    columns = record.data.get("columns") or []
    _section("data", {**{name: found for name, found in record.data.items() if name != "columns"}, **_by_name(columns)})
    _section("parameters", flatten(record.params))
    _section("versions", record.versions)
    if details.epochs:
        names = list(by_metric(details.epochs))
        rows = [[str(epoch.epoch), *(value(epoch.metrics.get(name)) for name in names)] for epoch in details.epochs]
        click.echo("\nhistory\n" + _indented(table(["EPOCH", *names], rows)))


@runs.command()
@click.argument("run_ids", nargs=-1, required=True)
@store_option
@json_option
def compare(url: str, as_json: bool, run_ids: tuple[str, ...]) -> None:
    """Show in what runs differ, and their metrics side by side."""
    with opened(url) as store:
        found = compare_runs(store, run_ids)
    if as_json:
        _print_json(asdict(found))
        return
    click.echo(
        table(["", *found.run_ids], _rows(found.metrics, found.run_ids) or [["no metrics", *[""] * len(found.run_ids)]])
    )
    for name, differences in (("parameters", found.params), ("data", found.data), ("versions", found.versions)):
        if differences:
            click.echo(f"\n{name} that differ")
            click.echo(table(["", *found.run_ids], _rows(differences, found.run_ids)))
        else:
            click.echo(f"\n{name}: the same")


@runs.command()
@click.option(
    "--metric", default="val_loss", show_default=True, help="Of the training; held_out.val_loss of a job's evaluation."
)
@click.option("--mode", type=click.Choice(["auto", "min", "max"]), default="auto", show_default=True)
@store_option
@json_option
def best(url: str, as_json: bool, metric: str, mode: str) -> None:
    """Print the name of the finished run that is the best by a metric."""
    with opened(url) as store:
        record = best_run(store, metric, cast(Mode, mode))
    if as_json:
        _print_json(record.to_json())
        return
    # The name alone on stdout, for scripts.
    click.echo(record.run_id)
    whose = "of the held-out rows" if metric not in record.metrics else f"of epoch {record.epoch}"
    click.echo(f"{metric} {value(record.measured[metric])}, {whose}", err=True)


@runs.command()
@click.option(
    "--keep-last", type=click.IntRange(min=0), metavar="N", help="Keep the newest N that finished, and N others."
)
@click.option(
    "--older-than", "older_than_s", callback=_seconds, metavar="AGE", help="Remove what is older: 90m, 12h, 30d, 4w."
)
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@store_option
@json_option
def gc(url: str, as_json: bool, keep_last: int | None, older_than_s: float | None, dry_run: bool) -> None:
    """Remove runs that are too many and too old; with both options, those that are both.

    A run in progress stays, and so does one that an alias refers to or that holds a saved model.
    """
    if keep_last is None and older_than_s is None:
        raise click.UsageError("say which runs may go: --keep-last N, --older-than AGE, or both")
    with opened(url) as store:
        fates = gc_runs(store, keep_last, older_than_s, dry_run=dry_run)
    if as_json:
        _print_json([asdict(fate) for fate in fates])
        return
    done = "would go" if dry_run else "removed"
    rows = [
        [
            fate.run_id,
            done if fate.removed else "stays",
            show_bytes(fate.size_bytes) if fate.removed else "",
            fate.reason,
        ]
        for fate in fates
    ]
    if rows:
        click.echo(table(["RUN", "", "SIZE", "REASON"], rows))
    gone = [fate.size_bytes for fate in fates if fate.removed]
    click.echo(f"{len(gone)} of {len(fates)} runs {done}, {show_bytes(sum(gone))}", err=True)


def _row(record: RunRecord, metrics: Sequence[str]) -> list[str]:
    rows, cause = record.data.get("rows"), record.cause or ""
    return [
        record.run_id,
        record.state,
        when(record.started),
        _took(record.started, record.ended),
        "-" if rows is None else str(rows),
        str(record.params.get("num_proc") or "-"),
        *(value(record.metrics[name]) if name in record.metrics else "-" for name in metrics),
        cause if len(cause) <= _CAUSE_WIDTH else f"{cause[: _CAUSE_WIDTH - 1]}…",
    ]


def _promoted(record: RunRecord) -> str:
    if record.promoted is None:
        return ""
    return ("yes" if record.promoted else "no") + (f": {record.decision}" if record.decision else "")


def _took(started: float, ended: float | None) -> str:
    return "-" if ended is None or math.isnan(started) else duration(ended - started)


def _by_name(columns: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Describe columns by what they are."""
    return {
        f"column {column.get('name')}": " ".join(
            str(column[key]) for key in ("kind", "dtype", "shape") if column.get(key) not in (None, [1])
        )
        for column in columns
    }


def _rows(found: SideBySide, run_ids: Sequence[str]) -> list[list[str]]:
    return [[name, *(value(row[run_id]) if run_id in row else "" for run_id in run_ids)] for name, row in found.items()]


def _section(title: str, found: Mapping[str, Any]) -> None:
    if found:
        width = max(map(len, found))
        lines = [f"{name:<{width}}  {value(item)}" for name, item in found.items()]
        click.echo(f"\n{title}\n" + _indented("\n".join(lines)))


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


def _print_json(found: Any) -> None:
    click.echo(to_json(found))
