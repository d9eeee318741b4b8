"""A driver that dies once the ranks have published their model: dying_driver.py fit STORE RUN_ID | train OPTION …"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from clusters import new_session
from faulty_fits import estimator, rows_of
from hvdspark.estimators import KerasEstimator

from hvdspark import Store, cli


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    # What the driver does first with a model that has come back.
    KerasEstimator._make_model = die  # type: ignore[method-assign, assignment]
    if sys.argv[1] == "train":
        cli.main(sys.argv[1:])
    else:
        _, _, url, run_id = sys.argv
        estimator(Store.create(url), run_id=run_id).fit(rows_of(new_session("local[2]")))
