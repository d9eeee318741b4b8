"""Rows as a Markdown table and as JSON, with the machine they come from."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.comparison import Row

CAPTION = (
    "Ratio: how many times better hvdspark is (more rows per second, fewer seconds, less memory); the median of the"
    " repeats, lowest and highest in brackets. Both sides were measured in turns on this machine."
)
MARKS = {"ok": "ok", "missed": "**missed**", "info": "", "skipped": "skipped", "failed": "**failed**"}
_DISTRIBUTIONS = ("hvdspark", "horovod", "tensorflow-cpu", "keras", "pyspark", "petastorm", "pyarrow", "numpy")


def machine() -> dict[str, Any]:
    """Describe what the measurements were taken on."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in _DISTRIBUTIONS},
    }


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def markdown(rows: Sequence[Row], made_on: Mapping[str, Any]) -> str:
    """Return the table with its caption and the machine."""
    lines = ["| | hvdspark | against | ratio | target | |", "|---|---:|---:|---:|---:|---|"]
    lines += [line(row) for row in rows]
    notes = [f"- {row.name}: {row.note}" for row in rows if row.note]
    return "\n".join([*lines, "", CAPTION, "", describe(made_on), *(["", *notes] if notes else [])])


def describe(made_on: Mapping[str, Any]) -> str:
    """Say in one line what the measurements were taken on."""
    versions = ", ".join(f"{name} {version}" for name, version in made_on["versions"].items())
    return (
        f"Machine: {made_on['cpu']}, {made_on['cores']} cores, {made_on['memory_gb']:g} GB; {made_on['system']}, Python"
        f" {made_on['python']}, {versions}."
    )


def line(row: Row) -> str:
    """Return a row's line of the table."""
    target = "" if row.target is None else f"≥ {number(row.target)}"
    cells = (row.name, _value(row.ours, row.unit), _value(row.theirs, row.unit), _ratio(row), target, MARKS[row.state])
    return f"| {' | '.join(cells)} |"


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return ""
    spread = f" ({number(row.spread[0])} to {number(row.spread[1])})" if row.spread and row.repeats > 1 else ""
    return f"{number(row.ratio)}{spread}"


def _value(value: float | None, unit: str) -> str:
    return "" if value is None else f"{number(value)} {unit}"


def number(value: float) -> str:
    """Write a positive number with about three digits."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def to_json(rows: Sequence[Row], made_on: Mapping[str, Any]) -> str:
    """Return ``{"machine": {…}, "rows": [{"name", "ratio", "target", "ok", …}]}`` as text."""
    return json.dumps({"machine": made_on, "rows": [row.to_json() for row in rows]}, indent=1, ensure_ascii=False)
