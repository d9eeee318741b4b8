"""Rows as a chart: ratios as bars on a logarithmic axis, with a mark at each target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks.comparison import Row
from benchmarks.report import number

INK, PALE = "#1d2733", "#5b6875"
STATES = {"ok": ("#2a7f62", "target met"), "missed": ("#d1603d", "target missed"), "info": ("#9aa7b4", "no target")}
TARGET_WIDTH = 2.2
FONT_SIZE = 9.5
# A target that is nearer to the end of a bar than this factor would stand in the bar's label.
LABEL_WIDTH = 3.0


def draw(rows: Sequence[Row], made_on: Mapping[str, Any], path: Path) -> None:
    """Draw the rows that have a ratio.

    Parameters
    ----------
    rows
        The table.
    made_on
        The machine, as `benchmarks.report.machine` describes it.
    path
        PNG file to write.
    """
    shown = [row for row in rows if row.ratio is not None]
    figure = Figure(figsize=(11, 2 + 0.34 * len(shown)), layout="constrained")
    axes = figure.add_subplot()
    for place, row in enumerate(shown):
        _draw_row(axes, place, row)
    _draw_axes(axes, shown)
    figure.suptitle("hvdspark, measured side by side", x=0.01, ha="left", fontsize=14, fontweight="bold", color=INK)
    axes.set_title(f"{made_on['cpu']}, {made_on['cores']} cores", loc="left", fontsize=FONT_SIZE, color=PALE)
    legend: list[Any] = [Patch(color=colour, label=label) for colour, label in STATES.values()]
    legend.append(Line2D([], [], color=INK, linewidth=TARGET_WIDTH, label="target"))
    figure.legend(handles=legend, loc="outside lower right", ncols=4, frameon=False, fontsize=FONT_SIZE)
    figure.savefig(path, dpi=150)


def _draw_row(axes: Axes, place: int, row: Row) -> None:
    ratio = row.ratio or 1.0
    # Bars begin where both sides are equal: to the right ours is better, to the left the other.
    axes.barh(place, ratio - 1, left=1, height=0.62, color=STATES[row.state][0])
    marks = [ratio]
    if row.target is not None:
        axes.plot([row.target] * 2, [place - 0.4, place + 0.4], color=INK, linewidth=TARGET_WIDTH)
        if 1 / LABEL_WIDTH < row.target / ratio < LABEL_WIDTH:
            marks.append(row.target)
    is_right = ratio >= 1
    axes.annotate(
        f"{number(ratio)}x",
        (max(marks) if is_right else min(marks), place),
        xytext=(7 if is_right else -7, 0),
        textcoords="offset points",
        va="center",
        ha="left" if is_right else "right",
        fontsize=FONT_SIZE,
        color=INK,
    )


def _draw_axes(axes: Axes, rows: Sequence[Row]) -> None:
    values = [1.0, *(value for row in rows for value in (row.ratio, row.target) if value is not None)]
    axes.set_xscale("log")
    axes.set_xlim(min(values) / 2.6, max(values) * 3)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_xlabel("how many times better hvdspark is (1x: equal)", color=PALE)
    axes.set_yticks(range(len(rows)), [row.name for row in rows], fontsize=FONT_SIZE)
    axes.invert_yaxis()
    axes.axvline(1, color=INK, linewidth=0.9)
    axes.grid(axis="x", color="#dfe4ea", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
