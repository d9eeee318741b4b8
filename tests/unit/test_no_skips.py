"""Continuous integration does not pass with tests that were skipped."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = """
import pytest

@pytest.fixture
def tool():
    pytest.skip("no such tool")

def test_that_needs_it(tool):
    pass

@pytest.mark.skipif(True, reason="no such program")
def test_that_is_marked():
    pass

def test_of_others():
    pytest.skip("not for this machine: it has one")

@pytest.mark.xfail
def test_of_a_known_fault():
    assert False
"""


@pytest.mark.parametrize(
    ("setting", "expected"), [("", "3 skipped, 1 xfailed"), ("1", "1 skipped, 1 xfailed, 2 errors")]
)
def test_a_skip_for_want_of_a_tool_is_a_failure_where_that_is_asked_for(
    tmp_path: Path, setting: str, expected: str
) -> None:
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rf", "."],
        cwd=tmp_path,
        env={**os.environ, "HVDSPARK_NO_SKIPS": setting},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert expected in ran.stdout
    if setting:
        assert "HVDSPARK_NO_SKIPS is set, and this was skipped: no such tool" in ran.stdout
        assert "this was skipped: no such program" in ran.stdout


def test_it_is_asked_for_in_continuous_integration() -> None:
    assert "export HVDSPARK_NO_SKIPS=1" in (ROOT / ".ci" / "run").read_text()
