"""Distributed deep learning inside Spark ML: Horovod ring-allreduce on Spark's barrier tasks.

The estimators are in :mod:`hvdspark.estimators`; here are the names that stand on their own.
"""

from hvdspark.run import run
from hvdspark.store import Store
from hvdspark.worker.pulse import moved_on

__version__ = "0.1.0"
__all__ = ["Store", "__version__", "moved_on", "run"]
