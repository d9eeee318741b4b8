"""Tables and values as people read them in a terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import datetime
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows under a head, with columns as wide as what is in them."""
    lines = [head, *rows]
    widths = [max(len(line[place]) for line in lines) for place in range(len(head))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def when(seconds: float | None) -> str:
    """Write a time as date and time of this machine's zone."""
    if seconds is None or math.isnan(seconds):
        return "-"
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def value(found: Any) -> str:
    """Write a JSON value on one line."""
    if found is None:
        return "-"
    if isinstance(found, float):
        return f"{found:.6g}"
    return found if isinstance(found, str) else json.dumps(found)
