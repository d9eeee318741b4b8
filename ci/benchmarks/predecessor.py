"""The virtual environment of horovod.spark: its own stack, with a Horovod compiled from the same source as ours."""

from __future__ import annotations

from pathlib import Path

from build_cache import Cache
from cached_env import python_with_horovod

CI = Path(__file__).resolve().parents[1]
LOCK = CI / "horovod-spark.lock"


def obtain_python(cache: Cache) -> Path:
    """Return the environment's interpreter; make the environment where the cache lacks it, which takes minutes.

    Raises
    ------
    BuildError
        When a package cannot be had or Horovod does not compile.
    """
    return python_with_horovod(cache, "horovod-spark", LOCK.read_text(encoding="utf-8"))
