"""The program of `fit_session` with hvdspark's estimator."""

from __future__ import annotations

from benchmarks import fit_session
from benchmarks.estimator import make_estimator

if __name__ == "__main__":
    fit_session.run(make_estimator)
