"""Numbers as people read them: rounded to what matters, with their units."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from typing import Any

NONE = "\N{EN DASH}"
"""Stands where there is no value."""

_MINUTE, _HOUR, _DAY = 60, 3600, 86400


def number(value: float) -> str:
    """Write a number with four significant digits: ``0.2411``, ``16,230``, ``1.2e-05``."""
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "\N{MINUS SIGN}∞"}.get(value, "NaN")
    if value and not 1e-4 <= abs(value) < 1e9:
        return _minus(f"{value:.3g}")
    digits = max(0, 3 - math.floor(math.log10(abs(value)))) if value else 0
    text = f"{value:,.{digits}f}"
    return _minus(text.rstrip("0").rstrip(".") if "." in text and float(value).is_integer() else text)


def tick(value: float) -> str:
    """Write a number of an axis, which is round already."""
    if abs(value) >= 1e9:
        return _minus(f"{value:.3g}")
    if abs(value) >= 1e4:
        return _minus(f"{value / 1e6:.6g}M" if abs(value) >= 1e6 else f"{value / 1e3:.6g}k")
    return _minus(f"{value:.6g}")


def duration(seconds: float) -> str:
    """Write a time: ``0.42 s``, ``12.3 s``, ``4 min 05 s``, ``1 h 12 min``, ``2 d 3 h``."""
    if not math.isfinite(seconds):
        return "unknown"
    if seconds < 9.95:
        return f"{seconds:.2f} s" if 0 < seconds < 0.995 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < _MINUTE:
        return f"{seconds:.1f} s" if seconds < 59.95 else "1 min 00 s"
    if whole < _HOUR:
        return f"{whole // _MINUTE} min {whole % _MINUTE:02d} s"
    if whole < _DAY:
        return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE:02d} min"
    return f"{whole // _DAY} d {whole % _DAY // _HOUR} h"


def share(part: float) -> str:
    """Write a share of a whole: ``12%``; what is there but rounds to nothing is ``<1%``."""
    return "<1%" if 0 < part < 0.005 else f"{part:.0%}"


def moment(seconds: float) -> str:
    """Write a time of the clock, in UTC: driver, ranks and reader need not live in one time zone."""
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (OverflowError, ValueError, OSError):
        return "unknown"


def count(amount: int, noun: str) -> str:
    """Write how many there are of something: ``1 epoch``, ``16 ranks``."""
    return f"{amount:,} {noun}" if amount == 1 else f"{amount:,} {noun}s"


def rate(value: float) -> str:
    """Write a learning rate, most of which are round: ``0.002``, ``7.63e-09``."""
    return _minus(f"{value:.4g}")


def value(found: Any) -> str:
    """Write a JSON value: what describes an object, as the call that makes it; what is nested, with indents."""
    if isinstance(found, str):
        return found
    if isinstance(found, float):
        # Seven digits are what a float32 holds; the rest is noise where one was made a double.
        return _minus(f"{found:.7g}")
    if isinstance(found, dict) and isinstance(found.get("class"), str):
        given = {name: item for name, item in found.items() if name not in ("class", "name") and not _is_unset(item)}
        return f"{found['class']}({', '.join(f'{name}={value(item)}' for name, item in given.items())})"
    if isinstance(found, list) and found and all(isinstance(item, dict) and "class" in item for item in found):
        return ", ".join(value(item) for item in found)
    return json.dumps(found, indent=2 if _is_nested(found) else None, ensure_ascii=False)


def _is_unset(found: Any) -> bool:
    return found is None or found is False


def _is_nested(found: Any) -> bool:
    items = found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()
    return any(isinstance(item, dict | list) for item in items) or len(str(found)) > 120


def _minus(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}", 1) if text.startswith("-") else text
