"""The virtual environment of horovod.spark: its own stack, with a Horovod compiled from the same source as ours.

It is made once and kept in the cache, under a key made of all that it consists of.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

from build_cache import Cache, run_quietly, say
from build_horovod import obtain_wheel
from horovod_recipe import Environment, Ingredients

CI = Path(__file__).resolve().parents[1]
LOCK = CI / "horovod-spark.lock"


def obtain_python(cache: Cache) -> Path:
    """Return the environment's interpreter; make the environment where the cache lacks it, which takes minutes.

    Raises
    ------
    BuildError
        When a package cannot be had or Horovod does not compile.
    """
    packages = hashlib.sha256(LOCK.read_bytes() + sys.version.encode()).hexdigest()[:16]
    venv = cache.root / "horovod-spark" / packages
    python, complete = venv / "bin" / "python", venv / ".complete"
    with cache.locked(f"horovod-spark-{packages}"):
        if not python.exists():
            shutil.rmtree(venv, ignore_errors=True)
        if not complete.exists():
            say("making the environment of horovod.spark")
            run_quietly([str(CI / "uv"), "venv", "--quiet", "--clear", "--python", sys.executable, str(venv)])
            _install(python, "--requirements", str(LOCK))
        key = Ingredients.gather(Environment.inspect(venv)).key()
        if not complete.exists() or complete.read_text() != key:
            _install(python, str(obtain_wheel(venv, cache)))
            complete.write_text(key)
    return python


def _install(python: Path, *what: str) -> None:
    options = ["--quiet", "--compile-bytecode", "--no-deps", "--python", str(python)]
    run_quietly([str(CI / "uv"), "pip", "install", *options, *what])
