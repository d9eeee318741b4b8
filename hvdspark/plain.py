"""Values as JSON has them: it knows no number that is not finite, and such a number is ``null`` there."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def to_json(value: Any, **options: Any) -> str:
    """Write JSON values, with ``null`` for numbers that are not finite; ``options`` are those of ``json.dumps``."""
    return json.dumps(finite_only(value), allow_nan=False, **options)


def finite_only(value: Any) -> Any:
    """Return JSON values with ``None`` for numbers that are not finite, and lists for tuples."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(name): finite_only(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_only(item) for item in value]
    return value


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Read numbers by name, as metrics are, from JSON values; ``None`` is NaN again."""
    return {str(name): math.nan if value is None else float(value) for name, value in values.items()}
