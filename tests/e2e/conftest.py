"""The fixtures of :mod:`clusters`, for this lane."""

from __future__ import annotations

from pathlib import Path

import pytest
from clusters import (  # noqa: F401 - pytest finds fixtures in a conftest
    _environment,
    _leaves_no_process,
    _shared,
    _travels_by_value,
    shares_a_session,
    spark,
    store,
)

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Function]) -> None:
    """Have the modules that share a session come one after the other, so that it and its warm pool start once."""
    sharing = {item.module for item in items if "spark" in item.fixturenames and shares_a_session(item.module)}
    items.sort(key=lambda item: item.path.is_relative_to(HERE) and item.module not in sharing)
