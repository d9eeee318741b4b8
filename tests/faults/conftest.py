"""The fixtures of :mod:`clusters`, for this lane, and the order of its modules."""

from __future__ import annotations

from pathlib import Path

import pytest
from clusters import (  # noqa: F401 - pytest finds fixtures in a conftest
    TWO_EXECUTORS,
    _environment,
    _leaves_no_process,
    _shared,
    _travels_by_value,
    spark,
    store,
)
from faulty_fits import _trained, df, undisturbed  # noqa: F401

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the modules that share a session come one after the other, before those that want another one.

    What a session costs most is what comes with its executors: ranks' imports.
    """
    places = [place for place, item in enumerate(items) if item.path.parent == HERE]
    ordered = sorted((items[place] for place in places), key=_wants_another_session)
    for place, item in zip(places, ordered, strict=True):
        items[place] = item


def _wants_another_session(item: pytest.Item) -> bool:
    module = item.getparent(pytest.Module)
    assert module is not None
    is_own = hasattr(module.obj, "spark_conf") or getattr(module.obj, "OWN_SESSION", False)
    return is_own or getattr(module.obj, "MASTER", TWO_EXECUTORS) != TWO_EXECUTORS
