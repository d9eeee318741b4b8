"""The virtual environment of Airflow, with an empty metadata database.

It is made once and kept in the cache, under a key made of all that it consists of. ``python ci/airflow_env.py`` makes
it and prints its interpreter.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from build_cache import Cache, run_quietly
from cached_env import install, key_of, new_environment

LOCK = Path(__file__).resolve().parent / "airflow.lock"


@dataclass(frozen=True)
class AirflowEnvironment:
    """Airflow as the cache holds it; to be used, and not to be written to."""

    folder: Path

    @property
    def python(self) -> Path:
        """The interpreter."""
        return self.folder / "venv" / "bin" / "python"

    @property
    def database(self) -> Path:
        """A SQLite database with Airflow's tables, to copy: making them takes longer than a small DAG."""
        return self.folder / "home" / "airflow.db"

    @property
    def site_packages(self) -> Path:
        """The folder of the packages."""
        return next(self.folder.glob("venv/lib/python3.*/site-packages"))


def obtain(cache: Cache) -> AirflowEnvironment:
    """Return the environment; make it where the cache lacks it, which takes half a minute.

    Raises
    ------
    BuildError
        When a package cannot be had, or Airflow makes no database.
    """
    key = key_of(LOCK.read_text(encoding="utf-8"))
    found = AirflowEnvironment(cache.root / "airflow" / key)
    complete = found.folder / ".complete"
    with cache.locked(f"airflow-{key}"):
        if not complete.exists():
            print("airflow: making its environment", file=sys.stderr, flush=True)
            shutil.rmtree(found.folder, ignore_errors=True)
            found.database.parent.mkdir(parents=True)
            _make(found)
            complete.touch()
    return found


def _make(environment: AirflowEnvironment) -> None:
    new_environment(environment.folder / "venv")
    install(environment.python, "--requirements", str(LOCK))
    home = f"AIRFLOW_HOME={environment.database.parent}"
    run_quietly(["env", home, str(environment.python), "-m", "airflow", "db", "migrate"])


if __name__ == "__main__":
    print(obtain(Cache.default()).python)
