"""The fixtures of :mod:`clusters`, for this lane."""

from __future__ import annotations

from clusters import (  # noqa: F401 - pytest finds fixtures in a conftest
    _environment,
    _leaves_no_process,
    _shared,
    _travels_by_value,
    spark,
    store,
)
