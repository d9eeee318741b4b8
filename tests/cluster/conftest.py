"""The fixtures of :mod:`clusters`, for this lane."""

from __future__ import annotations

from clusters import _environment, _leaves_no_process, store  # noqa: F401 - pytest finds fixtures in a conftest
