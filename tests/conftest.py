"""What the tests of all lanes share."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# The same examples on every run and machine: a test that fails now and then tells nobody anything.
settings.register_profile(
    "hvdspark", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("hvdspark")

# Set by .ci/run, where a tool that is missing must not make tests go unnoticed.
NO_SKIPS = "HVDSPARK_NO_SKIPS"

# How the reason begins of a test that is for machines of another kind.
ANOTHER_KIND = "not for this machine: "


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    """Let a test fail that is skipped where nothing may be."""
    report = yield
    if os.environ.get(NO_SKIPS) and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not reason.startswith(ANOTHER_KIND):
            report.outcome = "failed"
            report.longrepr = f"{NO_SKIPS} is set, and this was skipped: {reason}"
    return report
