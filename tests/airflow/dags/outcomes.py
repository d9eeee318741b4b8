"""A DAG whose tasks end in each of the ways that ``hvdspark train`` can end."""

from __future__ import annotations

import json
import os
from datetime import datetime, timedelta
from pathlib import Path

from airflow.sdk import DAG, Context

from hvdspark.airflow import HvdSparkTrainOperator

FOLDER = Path(os.environ["OUTCOMES"])
# The exit codes of a task's tries; 3 and None end without a result.
ENDINGS = {
    "bad.data": [65],
    "misconfigured": [78],
    "again": [3, 75, 0],
    "silent": [None, 0],
}


def note(context: Context) -> None:
    """Keep what a failed task says."""
    with (FOLDER / "messages").open("a") as messages:
        messages.write(json.dumps([context["ti"].task_id, str(context["exception"])]) + "\n")


def ending(task_id: str, codes: object, **keywords: object) -> HvdSparkTrainOperator:
    return HvdSparkTrainOperator(
        task_id=task_id,
        application=os.environ["JOB"],
        config="{{ var.value.folder }}",
        overrides={"codes": codes},
        **keywords,
    )


with DAG(
    "outcomes",
    start_date=datetime(2026, 1, 1),
    default_args={"retries": 2, "retry_delay": timedelta(0), "on_failure_callback": note, "on_retry_callback": note},
):
    for name, codes in ENDINGS.items():
        ending(name, codes)

with DAG("hanging", start_date=datetime(2026, 1, 1)):
    ending("train", "hang", retries=0)
