"""What is wrong with a cluster, found before a training is lost on it."""

from hvdspark.doctor.examination import examine
from hvdspark.doctor.findings import Allreduce, Examination, Finding

__all__ = ["Allreduce", "Examination", "Finding", "examine"]
