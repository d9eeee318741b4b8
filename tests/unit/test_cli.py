"""The command ``hvdspark``."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
from typing import Any

import pytest
from click.testing import CliRunner

from hvdspark import __version__, cli
from hvdspark.cli import info
from hvdspark.doctor import probe


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer for Horovod, whose import takes seconds."""
    found = {"gloo": True, "mpi": True, "nccl": False, "cuda": False}
    monkeypatch.setattr(info, "load_horovod", lambda: (found, "MPICH Version: 5.0.2", None))


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "load_horovod", lambda: ({}, None, "ImportError: undefined symbol"))


def test_the_version_is_that_of_the_distribution() -> None:
    result = CliRunner().invoke(cli.main, ["--version"])
    assert result.exit_code == 0
    assert __version__ in result.output
    assert importlib.metadata.version("hvdspark") == __version__


def test_without_a_command_the_help_names_those_there_are() -> None:
    result = CliRunner().invoke(cli.main, ["--help"])
    assert result.exit_code == 0
    assert "info" in result.output


@pytest.mark.usefixtures("built")
def test_info_lists_versions_and_what_horovod_was_built_with() -> None:
    result = CliRunner().invoke(cli.main, ["info"])
    assert result.exit_code == 0
    lines = dict(line.rsplit(maxsplit=1) for line in result.output.splitlines())
    assert lines["python"] == platform.python_version()
    assert lines["pyspark"] == importlib.metadata.version("pyspark")
    assert lines["hvdspark"] == __version__
    assert lines["horovod with gloo"] == "yes"
    assert lines["horovod with nccl"] == "no"


@pytest.mark.usefixtures("built")
def test_info_as_json_is_one_object() -> None:
    result = CliRunner().invoke(cli.main, ["info", "--json"])
    assert result.exit_code == 0
    found = json.loads(result.output)
    assert found["horovod_built"] == {"gloo": True, "mpi": True, "nccl": False, "cuda": False}
    assert found["versions"]["keras"] == importlib.metadata.version("keras")
    assert found["error"] is None


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("arguments", [["info"], ["info", "--json"]])
def test_a_horovod_that_cannot_be_loaded_is_exit_code_1_and_its_reason(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 1
    assert "Horovod cannot be loaded: ImportError: undefined symbol" in result.stderr
    if "--json" in arguments:
        assert json.loads(result.stdout)["error"] == "ImportError: undefined symbol"


@pytest.mark.parametrize(
    ("done", "expected"),
    [
        ((1, "", "Traceback\nImportError: no horovod\n"), ({}, None, "ImportError: no horovod")),
        ((-11, "", ""), ({}, None, "exit code -11")),
        ((0, 'noise\n[{"gloo": true}, "MPICH"]\n', "warnings"), ({"gloo": True}, "MPICH", None)),
        ((0, "", ""), ({}, None, "exit code 0")),
    ],
)
def test_what_the_process_that_loads_horovod_says_is_understood(
    monkeypatch: pytest.MonkeyPatch, done: tuple[int, str, str], expected: Any
) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: subprocess.CompletedProcess(args, *done))
    assert probe.load_horovod() == expected


def test_the_module_is_the_command_and_finds_this_horovod() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "hvdspark", "info", "--json"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = json.loads(done.stdout)
    assert found["horovod_built"]["gloo"] is True
    assert found["mpi_library"].startswith("MPICH Version: ")
