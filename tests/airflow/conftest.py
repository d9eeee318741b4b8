"""Airflow as a user has it: an environment of its own, in which hvdspark is installed without what it depends on."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import airflow_env
import pytest
from airflow_home import processes_of
from build_cache import Cache, run_quietly
from clusters import _environment, _leaves_no_process  # noqa: F401 - pytest finds fixtures in a conftest
from standalone import Cluster, two_workers

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def airflow_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has Airflow's packages, from the cache, and hvdspark alone beside them."""
    environment = airflow_env.obtain(Cache.default())
    folder = tmp_path_factory.mktemp("airflow-venv")
    uv = str(ROOT / "ci" / "uv")
    run_quietly([uv, "venv", "--quiet", "--clear", "--python", str(environment.python), str(folder)])
    (site_packages,) = folder.glob("lib/python3.*/site-packages")
    (site_packages / "airflow.pth").write_text(f"{environment.site_packages}\n")
    python = folder / "bin" / "python"
    source = _copy_of_the_source(tmp_path_factory.mktemp("source"))
    run_quietly([uv, "pip", "install", "--quiet", "--no-deps", "--python", str(python), str(source)])
    return python


def _copy_of_the_source(folder: Path) -> Path:
    """Copy what is built: in the checkout, setuptools would also pack what an earlier build left there."""
    for name in ("hvdspark", "estimators"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A home of Airflow with an empty database; whatever its tasks start must end with them."""
    folder = tmp_path / "airflow"
    (folder / "dags").mkdir(parents=True)
    shutil.copy(airflow_env.obtain(Cache.default()).database, folder / "airflow.db")
    yield folder
    left = processes_of(folder)
    for process in left:
        process.kill()
    assert left == []


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory, _environment: None) -> Iterator[Cluster]:  # noqa: F811
    with two_workers(tmp_path_factory.mktemp("spark")) as found:
        yield found
