"""Distributed deep learning inside Spark ML: Horovod ring-allreduce on Spark's barrier tasks.

The estimators are in :mod:`hvdspark.estimators`; here are the names that stand on their own.
"""

from hvdspark.registry import best_run, compare_runs, list_runs, show_run
from hvdspark.retention import gc_runs
from hvdspark.run import run
from hvdspark.runs import RunRecord
from hvdspark.store import Store
from hvdspark.worker.pulse import moved_on

__version__ = "0.1.0"
__all__ = [
    "RunRecord",
    "Store",
    "__version__",
    "best_run",
    "compare_runs",
    "gc_runs",
    "list_runs",
    "moved_on",
    "run",
    "show_run",
]
