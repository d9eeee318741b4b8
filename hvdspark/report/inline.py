"""An SVG file of matplotlib as a part of a page: in the page's font and colours, with values under the mouse.

There is no script in it: what appears under the mouse is there from the beginning, and the page's style sheet shows
it. So a page can forbid scripts altogether, and works where they do not run (mail, artefact viewers of CI servers).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.etree import ElementTree as ET

# More zones for the mouse than this are narrower than it can be held.
_MOST_READOUTS = 120

LINE = 17
"""Pixels from a readout's line to the next."""

# More values than these do not fit into a line, where letters are as large as on a telephone.
_LINE_VALUES = 2


@dataclass(frozen=True)
class Ink:
    """A colour of the page.

    Parameters
    ----------
    variable
        What the style sheet calls it, which has one for light and one for dark pages.
    mark
        What stands for it where matplotlib draws.
    """

    variable: str
    mark: str


_NAMES = (
    *("train", "val", "single", "span", "low", "high"),
    *("compute", "allreduce", "wait", "validate", "rest"),
    *("axis", "grid", "quiet"),
)
INKS = {name: Ink(f"--{name}", f"#0000{number:02x}") for number, name in enumerate(_NAMES, 1)}
"""The colours that charts may use, by name."""

_MARK = re.compile(r"#0000([0-9a-f]{2})\b")
_ID = re.compile(r"(?<=url\(#)[^)]+")


@dataclass(frozen=True)
class Readout:
    """What appears when the mouse is at an epoch.

    Parameters
    ----------
    x
        Where it is, in the chart's pixels.
    epoch
        Its number.
    values
        Name, value and colour of what is shown for it.
    note
        What is said besides.
    """

    x: float
    epoch: int
    values: Sequence[tuple[str, str, str]]
    note: str = ""


def inline(svg: str, key: str, label: str, unit: str, readouts: Sequence[Readout], *, top: float, bottom: float) -> str:
    """Return the SVG element for a page.

    Parameters
    ----------
    svg
        The file's text.
    key
        Begins the ids in it, which must differ from those of other charts of the page.
    label
        What those are told who cannot see it.
    unit
        Written above the axis.
    readouts
        What appears at each epoch, by position.
    top, bottom
        Where the plot begins and ends, in pixels from above.
    """
    root = ET.fromstring(svg)
    _strip(root)
    width, height = root.attrib["viewBox"].split()[2:]
    root.attrib = {"viewBox": f"0 0 {width} {height}", "role": "img", "aria-label": label, "class": "chart"}
    for element in root.iter():
        _adapt(element, key)
    ET.SubElement(root, "text", {"class": "unit", "x": "2", "y": "15"}).text = unit
    for readout, left, right in _zones(readouts, float(width)):
        root.append(_hover(readout, left, right, top, bottom))
    return ET.tostring(root, encoding="unicode", short_empty_elements=True)


def readout_lines(values: int) -> int:
    """Return how many lines a readout of so many values has."""
    return max(1, -(-values // _LINE_VALUES))


def _strip(root: ET.Element) -> None:
    """Drop what HTML has no use for: name spaces, metadata, a style sheet that would hold for the whole page."""
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        element.attrib = {name.rpartition("}")[2]: text for name, text in element.attrib.items()}
        element.text = (element.text or "").strip()
        element.tail = None
    for parent in list(root.iter()):
        for child in list(parent):
            is_global = child.tag == "defs" and child.find("style") is not None
            if child.tag == "metadata" or is_global:
                parent.remove(child)


def _adapt(element: ET.Element, key: str) -> None:
    attributes = element.attrib
    if "id" in attributes:
        # Those of groups are numbers; only definitions are referred to.
        if element.tag == "g":
            del attributes["id"]
        else:
            attributes["id"] = f"{key}-{attributes['id']}"
    if "href" in attributes:
        attributes["href"] = f"#{key}-{attributes['href'][1:]}"
    if "clip-path" in attributes:
        attributes["clip-path"] = _ID.sub(lambda found: f"{key}-{found[0]}", attributes["clip-path"])
    if "d" in attributes:
        attributes["d"] = " ".join(attributes["d"].split())
    if element.tag == "text":
        anchor = re.search(r"text-anchor: (\w+)", attributes.get("style", ""))
        attributes.pop("style", None)
        attributes.pop("transform", None)
        if anchor:
            attributes["text-anchor"] = anchor[1]
    elif "style" in attributes:
        attributes["style"] = _MARK.sub(lambda found: f"var({_variable(found[1])})", attributes["style"])


def _variable(mark: str) -> str:
    return INKS[_NAMES[int(mark, 16) - 1]].variable


def _zones(readouts: Sequence[Readout], width: float) -> Iterator[tuple[Readout, float, float]]:
    """Give each readout the part of the width that is nearest to it."""
    every = -(-len(readouts) // _MOST_READOUTS) or 1
    kept = [*readouts[:-1:every], *readouts[-1:]]
    edges = [0.0, *((first.x + second.x) / 2 for first, second in pairwise(kept)), width]
    for place, readout in enumerate(kept):
        yield readout, edges[place], edges[place + 1]


def _hover(readout: Readout, left: float, right: float, top: float, bottom: float) -> ET.Element:
    group = ET.Element("g", {"class": "at"})
    ET.SubElement(
        group,
        "rect",
        {"x": f"{left:.1f}", "y": "0", "width": f"{right - left:.1f}", "height": f"{bottom:.0f}", "class": "zone"},
    )
    x = f"{readout.x:.1f}"
    ET.SubElement(group, "line", {"x1": x, "x2": x, "y1": f"{top:.0f}", "y2": f"{bottom:.0f}"})
    text = ET.SubElement(group, "text", {"x": "2", "y": "15"})
    ET.SubElement(text, "tspan", {"class": "epoch"}).text = f"epoch {readout.epoch}"
    for place, (name, value, ink) in enumerate(readout.values):
        is_below = place and place % _LINE_VALUES == 0
        where = {"x": "2", "dy": str(LINE)} if is_below else {"dx": "10"}
        ET.SubElement(text, "tspan", {**where, "style": f"fill: var({INKS[ink].variable})"}).text = f"{name} "
        ET.SubElement(text, "tspan", {"class": "value"}).text = value
    if readout.note:
        ET.SubElement(text, "tspan", {"dx": "10"}).text = readout.note
    return group
