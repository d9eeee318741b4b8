"""A standalone cluster of this machine, and what spark-submit sends to it: hvdspark as a zip, or an environment.

The environments here have all packages of the checkout's own but hvdspark, whose sources they would find otherwise.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import _environment, _leaves_no_process, store  # noqa: F401 - pytest finds fixtures in a conftest
from standalone import Cluster, two_workers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, _environment: None) -> Iterator[Cluster]:  # noqa: F811
    with two_workers(tmp_path_factory.mktemp("cluster")) as found:
        yield found


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Zip hvdspark as its wheel does."""
    path = tmp_path_factory.mktemp("package") / "hvdspark.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for folder, name in ((ROOT / "hvdspark", "hvdspark"), (ROOT / "estimators", "hvdspark/estimators")):
            for file in folder.rglob("*.*"):
                if file.parent.name != "__pycache__":
                    archive.write(file, f"{name}/{file.relative_to(folder)}")
    return path


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an environment without hvdspark; returns its interpreter."""
    python = new_environment(tmp_path_factory.mktemp("bare") / "env")
    # Isolated: the current folder may be the checkout.
    found = subprocess.run([python, "-I", "-c", "import hvdspark"], capture_output=True, text=True, check=False)
    assert "No module named 'hvdspark'" in found.stderr
    return python


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory, package: Path) -> tuple[Path, Path]:
    """Make an environment with hvdspark in it; returns its interpreter, and the environment as an archive."""
    folder = tmp_path_factory.mktemp("packed")
    python = new_environment(folder / "env")
    with zipfile.ZipFile(package) as archive:
        archive.extractall(packages_of(folder / "env"))
    path = folder / "env.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder / "env", arcname=".")
    return python, path


def new_environment(folder: Path) -> Path:
    """Make an environment that sees this one's packages; of its .pth files, by which hvdspark is found, none."""
    venv.create(folder, with_pip=False)
    (packages_of(folder) / "all.pth").write_text(sysconfig.get_path("purelib"))
    return folder / "bin/python"


def packages_of(folder: Path) -> Path:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return folder / "lib" / version / "site-packages"
