"""Virtual environments that are made once and kept in the cache, under a key made of all that they consist of."""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

from build_cache import Cache, run_quietly, say
from build_horovod import obtain_wheel
from horovod_recipe import Environment, Ingredients

_UV = str(Path(__file__).resolve().parent / "uv")


def key_of(requirements: str) -> str:
    """Return the key of an environment with these packages, on this Python."""
    return hashlib.sha256(f"{requirements}{sys.version}".encode()).hexdigest()[:16]


def new_environment(venv: Path) -> None:
    """Make an empty environment, in the place of one that may be there."""
    run_quietly([_UV, "venv", "--quiet", "--clear", "--python", sys.executable, str(venv)])


def install(python: Path, *what: str, compile_bytecode: bool = True) -> None:
    """Install packages, without what they depend on."""
    options = ["--quiet", *(["--compile-bytecode"] if compile_bytecode else []), "--no-deps", "--python", str(python)]
    run_quietly([_UV, "pip", "install", *options, *what])


def python_with_horovod(
    cache: Cache, name: str, requirements: str, *, mpi: str = "mpich", compile_bytecode: bool = True
) -> Path:
    """Return the interpreter of an environment with a Horovod; make what the cache lacks of it, which takes minutes.

    Parameters
    ----------
    cache
        Where it is kept.
    name
        Its folder there.
    requirements
        The packages at their versions, as pip reads them.
    mpi
        What Horovod is compiled for.
    compile_bytecode
        Whether all packages are compiled at once; where few of them are ever imported, that takes longer.

    Raises
    ------
    BuildError
        When a package cannot be had or Horovod does not compile.
    """
    packages = key_of(requirements)
    venv = cache.root / name / packages
    python, complete = venv / "bin" / "python", venv / ".complete"
    with cache.locked(f"{name}-{packages}"):
        if not python.exists():
            shutil.rmtree(venv, ignore_errors=True)
        if not complete.exists():
            say(f"making the environment {name}")
            new_environment(venv)
            lock = venv / "requirements.txt"
            lock.write_text(requirements, encoding="utf-8")
            install(python, "--requirements", str(lock), compile_bytecode=compile_bytecode)
        key = Ingredients.gather(Environment.inspect(venv, mpi=mpi)).key()
        if not complete.exists() or complete.read_text() != key:
            install(python, str(obtain_wheel(venv, cache, mpi=mpi)), compile_bytecode=compile_bytecode)
            complete.write_text(key)
    return python
