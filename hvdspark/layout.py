"""Where a Store has its runs, and a run what its ranks measured."""

from __future__ import annotations

import posixpath

RUNS = "runs"

# In a run's folder.
HISTORY, PROGRESS = "history.json", "progress.json"
TENSORBOARD, TIMELINE = "tensorboard", "timeline"


def run_folder(run_id: str) -> str:
    """Return the folder of a run, relative to the Store."""
    return posixpath.join(RUNS, run_id)
