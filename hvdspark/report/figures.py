"""Charts over epochs: matplotlib lays them out, and :mod:`hvdspark.report.inline` makes them a part of the page."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator
from matplotlib.typing import RcKeyType

from hvdspark.report import words
from hvdspark.report.inline import INKS, LINE, Readout, inline, readout_lines

# In pixels, where the page shows a chart at its full width; the page scales it.
_WIDTH, _HEIGHT = 480, 248
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 10, 28, 34

_SETTINGS: dict[RcKeyType, Any] = {
    "svg.fonttype": "none",  # text stays text, in the font of the page
    "svg.hashsalt": "hvdspark",  # the same run makes the same page
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "font.size": 12,
    "lines.solid_capstyle": "round",
}
# From an axis to its labels.
_PAD = 12
_DPI = 72  # at which matplotlib's points are pixels

# More points than this run into each other, and are then drawn without markers.
_MARKED_POINTS = 40
# So many have each its label, and so many have room at least.
_LABELLED_EPOCHS, _LEAST_EPOCHS = 10, 4
# From a value to one a hundred times as large, the lower part of a linear axis shows nothing.
_LOG_RATIO = 100.0


@dataclass(frozen=True)
class Series:
    """One line, or one part of each bar.

    Parameters
    ----------
    name
        As readers call it.
    values
        One for each epoch; ``None`` where it has none.
    ink
        Its colour: a name of ``inline.INKS``.
    """

    name: str
    values: Sequence[float | None]
    ink: str
    marker: str = "o"

    @property
    def finite(self) -> list[float]:
        """The values that can be drawn."""
        return [value for value in self.values if value is not None and math.isfinite(value)]

    @property
    def drawn(self) -> list[float]:
        """One number for each epoch, NaN where there is nothing to draw."""
        return [math.nan if value is None or not math.isfinite(value) else value for value in self.values]


@dataclass(frozen=True)
class Chart:
    """What a chart over epochs shows.

    Parameters
    ----------
    key
        Begins the names of elements in the page.
    label
        What those are told who cannot see it.
    epochs
        Their numbers.
    series
        What is drawn.
    unit
        Written above the axis.
    notes
        Added to what an epoch's readout says.
    show
        Writes a value for a readout.
    """

    key: str
    label: str
    epochs: Sequence[int]
    series: Sequence[Series]
    unit: str = ""
    notes: Sequence[str] = ()
    show: Callable[[float], str] = words.number


def lines(chart: Chart, *, best: int | None = None, from_zero: bool = False, may_be_log: bool = False) -> str:
    """Draw a line for each series.

    Parameters
    ----------
    chart
        What is drawn.
    best
        Position of an epoch that gets a ring, on the last series.
    from_zero
        Whether the axis begins at zero.
    may_be_log
        Whether values of very different sizes get a logarithmic axis.
    """
    values = [value for series in chart.series for value in series.finite]
    is_log = may_be_log and len(values) > 1 and min(values) > 0 and max(values) / min(values) > _LOG_RATIO
    with mpl.rc_context(_SETTINGS):
        figure, axes = _frame(chart)
        for series in chart.series:
            _line(axes, chart.epochs, series)
        if best is not None:
            ringed = chart.series[-1]
            axes.plot(
                chart.epochs[best], ringed.drawn[best], "o", ms=11, mfc="none", mec=INKS[ringed.ink].mark, mew=1.6
            )
        _scale(axes, is_log=is_log, from_zero=from_zero)
        unit = ", ".join(text for text in (chart.unit, "logarithmic" if is_log else "") if text)
        return _finished(figure, axes, chart, unit)


def stacks(chart: Chart) -> str:
    """Draw a bar for each epoch, in which the series are stacked."""
    with mpl.rc_context(_SETTINGS):
        figure, axes = _frame(chart)
        foot = [0.0] * len(chart.epochs)
        for series in chart.series:
            heights = [0.0 if math.isnan(value) else value for value in series.drawn]
            head = [below + height for below, height in zip(foot, heights, strict=True)]
            if len(chart.epochs) <= _MARKED_POINTS:
                axes.bar(chart.epochs, heights, 0.62, bottom=foot, color=INKS[series.ink].mark)
            else:
                axes.fill_between(chart.epochs, foot, head, step="mid", color=INKS[series.ink].mark, lw=0)
            foot = head
        _scale(axes, is_log=False, from_zero=True)
        return _finished(figure, axes, chart, chart.unit)


def spans(chart: Chart) -> str:
    """Draw what lies between two series, the lower one first, and both."""
    low, high = chart.series
    with mpl.rc_context(_SETTINGS):
        figure, axes = _frame(chart)
        if len(chart.epochs) <= _MARKED_POINTS:
            axes.vlines(chart.epochs, low.drawn, high.drawn, color=INKS["span"].mark, lw=7, capstyle="round")
        else:
            axes.fill_between(chart.epochs, low.drawn, high.drawn, color=INKS["span"].mark, lw=0)
        for series in chart.series:
            _line(axes, chart.epochs, series, is_thin=True)
        _scale(axes, is_log=False, from_zero=True)
        return _finished(figure, axes, chart, chart.unit)


def _frame(chart: Chart) -> tuple[Figure, Axes]:
    epochs, top = chart.epochs, _top(chart)
    figure = Figure(figsize=(_WIDTH / _DPI, _HEIGHT / _DPI), dpi=_DPI)
    axes = figure.add_axes(
        (
            _LEFT / _WIDTH,
            _BOTTOM / _HEIGHT,
            (_WIDTH - _LEFT - _RIGHT) / _WIDTH,
            (_HEIGHT - top - _BOTTOM) / _HEIGHT,
        )
    )
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(INKS["axis"].mark)
    axes.tick_params(length=0, pad=_PAD, labelcolor=INKS["quiet"].mark)
    axes.grid(axis="y", color=INKS["grid"].mark, lw=1)
    axes.set_axisbelow(True)
    # Below the labels of the other axis, beside its own: it takes no room there.
    axes.annotate(
        "epoch",
        (0, 0),
        (-_PAD, -_PAD),
        textcoords="offset points",
        xycoords="axes fraction",
        ha="right",
        va="top",
        color=INKS["quiet"].mark,
    )
    axes.xaxis.set_major_locator(
        FixedLocator(epochs)
        if len(epochs) <= _LABELLED_EPOCHS
        else MaxNLocator(nbins=7, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])
    )
    # A few epochs are not spread over all the width.
    length = epochs[-1] - epochs[0]
    margin = max(0.5, 0.02 * length, (_LEAST_EPOCHS - length) / 2)
    axes.set_xlim(epochs[0] - margin, epochs[-1] + margin)
    return figure, axes


def _top(chart: Chart) -> float:
    """Return where the plot begins: below the lines of a readout."""
    return _TOP + LINE * (readout_lines(len(chart.series)) - 1)


def _line(axes: Axes, epochs: Sequence[int], series: Series, *, is_thin: bool = False) -> None:
    marker = series.marker if len(epochs) <= _MARKED_POINTS else ""
    ink = INKS[series.ink].mark
    axes.plot(epochs, series.drawn, color=ink, lw=1.2 if is_thin else 2, marker=marker, ms=5, mew=0)


def _scale(axes: Axes, *, is_log: bool, from_zero: bool) -> None:
    if is_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(base=10, numticks=6))
        axes.minorticks_off()
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=4, min_n_ticks=2, steps=[1, 2, 2.5, 5, 10]))
        axes.margins(y=0.08)
        if from_zero:
            axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: words.tick(value)))


def _finished(figure: Figure, axes: Axes, chart: Chart, unit: str) -> str:
    axes.autoscale_view()
    written = io.StringIO()
    figure.savefig(
        written, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Type", "Format"))
    )
    readouts = [
        Readout(
            x=float(axes.transData.transform((epoch, 0 if axes.get_yscale() == "linear" else 1))[0]),
            epoch=epoch,
            values=[
                (series.name, chart.show(value), series.ink)
                for series in chart.series
                if (value := series.values[place]) is not None
            ],
            note=chart.notes[place] if chart.notes else "",
        )
        for place, epoch in enumerate(chart.epochs)
    ]
    return inline(written.getvalue(), chart.key, chart.label, unit, readouts, top=_top(chart), bottom=_HEIGHT - _BOTTOM)
