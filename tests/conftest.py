"""What the tests of all lanes share."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# The same examples on every run and machine: a test that fails now and then tells nobody anything.
settings.register_profile(
    "hvdspark", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("hvdspark")
