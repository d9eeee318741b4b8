"""A driver of its own, which trains until something happens to it: driver.py STORE RUN_ID MARK."""

from __future__ import annotations

import sys
import time
from functools import partial
from pathlib import Path

from clusters import new_session
from faulty_fits import Fault, estimator, rows_of

from hvdspark import Store

if __name__ == "__main__":
    url, run_id, mark = sys.argv[1:]
    spark = new_session("local-cluster[2,1,2048]")
    fault = Fault(Path(mark), 1, 2, 3, partial(time.sleep, 600))
    estimator(Store.create(url), fault, run_id=run_id).fit(rows_of(spark))
