"""A model that is trained anew every night, and goes into production only where it is better.

extract -> train -> evaluate -> promote or keep -> gc

What it needs in Airflow: the connection ``spark_default``, the Variables below, and ``spark-submit`` on the workers'
PATH. The job itself is described in ``job.yaml``; this file says when it runs, and what comes before and after.

| Variable | What it is |
|---|---|
| ``retrain_folder`` | the folder of this file, as the driver finds it; ``submit`` lies beside it |
| ``retrain_store`` | the Store that driver, executors and Airflow's workers reach |
| ``retrain_source``, ``retrain_data`` | where the raw deliveries are, and where the cleaned ones go |
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

from airflow.providers.apache.spark.operators.spark_submit import SparkSubmitOperator
from airflow.providers.smtp.notifications.smtp import SmtpNotifier
from airflow.sdk import (
    DAG,
    CronDataIntervalTimetable,
    Param,
    TriggerRule,
    get_current_context,
    task,
)
from airflow.sdk.exceptions import AirflowFailException

from hvdspark.airflow import HvdSparkTrainOperator

FOLDER = "{{ var.value.retrain_folder }}"
STORE = "{{ var.value.retrain_store }}"
SOURCE = "{{ var.value.retrain_source }}"
DATA = "{{ var.value.retrain_data }}"

# The night's rows are those of the data interval. The model learns from the days before, and is compared with the one
# in use on the interval itself, which neither has seen.
FIRST_DAY = "{{ (data_interval_end - macros.timedelta(days=params.days)) | ds }}"
NEWEST_DAY = "{{ data_interval_start | ds }}"
END = "{{ data_interval_end | ds }}"

KEEP_RUNS, KEEP_S = 14, 30 * 86400

SPARK = {"spark.dynamicAllocation.enabled": "false"}


@task.branch
def evaluate(result: dict[str, Any]) -> str:
    """Say how both models did on the newest day, and which way it goes on from here."""
    current = result["champion"] or {"run_id": None, "metrics": {}}
    metrics = {
        "run_id": result["run_id"],
        "new": result["metrics"],
        "current_run_id": current["run_id"],
        "current": current["metrics"],
        "promoted": result["promoted"],
    }
    get_current_context()["ti"].xcom_push(key="metrics", value=metrics)
    print(f"new {metrics['new']}, current {metrics['current']}: {result['cause'] or 'better'}")
    return "promote" if result["promoted"] else "keep"


@task
def promote(store: str, result: dict[str, Any]) -> dict[str, Any]:
    """Put the champion into production. The place for an approval, or for a trial in a staging area, is before."""
    from hvdspark import Store, aliases

    opened = Store.create(store)
    champion = aliases.read_alias(opened, "champion")
    if champion is None or champion.run_id != result["run_id"]:
        raise AirflowFailException(f"the champion is {champion and champion.run_id} by now, not {result['run_id']}")
    entry = aliases.promote(opened, "production", champion)
    return {"run_id": entry.run_id, "model": entry.model}


@task
def keep(result: dict[str, Any]) -> str:
    """Leave production as it is."""
    return str(result["cause"])


@task(trigger_rule=TriggerRule.NONE_FAILED_MIN_ONE_SUCCESS)
def gc(store: str) -> list[str]:
    """Remove old runs and datasets; those that aliases refer to stay, and so does a way back from them."""
    from hvdspark import Store, retention

    opened = Store.create(store)
    opened.gc()
    return [verdict.run_id for verdict in retention.gc_runs(opened, KEEP_RUNS, KEEP_S) if verdict.removed]


with DAG(
    "retrain",
    schedule=CronDataIntervalTimetable("0 0 * * *", timezone="UTC"),
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,  # runs follow each other: the next one is compared with what this one promotes
    default_args={"retries": 3, "retry_delay": timedelta(minutes=5), "retry_exponential_backoff": True},
    dagrun_timeout=timedelta(hours=8),  # a night that takes longer fails, and so somebody hears of it
    on_failure_callback=SmtpNotifier(
        to="models@example.com",
        subject="{{ dag_run.run_id }} of {{ dag_run.dag_id }} failed",
        html_content="{{ reason }}",
    ),
    params={
        "days": Param(28, type="integer", minimum=2, description="Days to learn from, the newest included."),
        "overrides": Param({}, type="object", description='Values instead of job.yaml\'s: {"epochs": 3}.'),
    },
    render_template_as_native_obj=True,  # so that `overrides` arrives as a dictionary
    doc_md=__doc__,
) as dag:
    # Any Spark program: the provider's own operator.
    extract = SparkSubmitOperator(
        task_id="extract",
        application=f"{FOLDER}/extract.py",
        application_args=["--source", SOURCE, "--since", FIRST_DAY, "--until", END, "--output", DATA],
        conf=SPARK,
        execution_timeout=timedelta(hours=1),
    )
    # A retry goes on from the last checkpoint; what cannot be mended by a retry fails at once.
    train = HvdSparkTrainOperator(
        task_id="train",
        application=f"{FOLDER}/../submit/hvdspark_job.py",
        config=f"{FOLDER}/job.yaml",
        store=STORE,
        since=FIRST_DAY,
        until=END,
        overrides="{{ dict({'input.path': var.value.retrain_data, 'evaluation.since': data_interval_start | ds},"
        " **params.overrides) }}",
        conf=SPARK,
        execution_timeout=timedelta(hours=4),
    )
    decision = evaluate(train.output)
    promoted = promote(STORE, train.output)
    kept = keep(train.output)
    extract >> train >> decision >> [promoted, kept] >> gc(STORE)


if __name__ == "__main__":  # python retrain_dag.py runs it once, without a scheduler
    dag.test()
