"""The fixtures of :mod:`clusters`, for this lane."""

from __future__ import annotations

from pathlib import Path

import pytest
from clusters import (  # noqa: F401 - pytest finds fixtures in a conftest
    _environment,
    _leaves_no_process,
    _shared,
    _travels_by_value,
    sharing_first,
    spark,
    store,
)


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    sharing_first(items, Path(__file__).parent)
