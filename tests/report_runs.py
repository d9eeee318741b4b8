"""Runs to make reports of, as they are found in a Store: made by formulas, written as drivers and ranks write them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from hvdspark import Store
from hvdspark.history import EpochRecord, Progress, RankTimes, write_history, write_progress

STARTED = 1_795_000_000.0

PARAMS = {
    "num_proc": 2,
    "batch_size": 512,
    "epochs": 8,
    "optimizer": {
        "class": "Adam",
        "name": "adam",
        "learning_rate": 0.0010000000474974513,
        "beta_1": 0.9,
        "clipnorm": None,
    },
    "loss": {"class": "Huber", "name": "huber_loss", "reduction": "sum_over_batch_size", "delta": 30.0},
    "metrics": [{"class": "RootMeanSquaredError", "name": "rmse", "dtype": "float32"}],
    "validation": "is_validation",
    "feature_cols": ["scaled", "carrier_index", "origin_index", "dest_index", "month", "weekday"],
    "label_cols": ["arr_delay"],
    "output_cols": ["prediction"],
    "random_seed": 2013,
    "checkpoint_callback": {"monitor": "val_rmse", "mode": "auto"},
    "controller": "gloo",
    "cache": "auto",
    "train_reader_num_workers": 2,
    "max_restarts": 3,
    "val_batch_size": None,
}
VERSIONS = {
    "python": "3.11.2",
    "hvdspark": "0.1.0",
    "horovod": "0.28.1",
    "tensorflow": "2.21.0",
    "keras": "3.15.1",
    "pyspark": "4.0.5",
    "petastorm": "0.13.1",
    "pyarrow": "26.0.1",
    "numpy": "2.4.6",
}
DATA = {
    "source": "DataFrame",
    "fingerprint": "e7e8b0ce67940a53222a6808f01855349af3ed8c9be578cfea4bfcdc0eb43ca4",
    "dataset": "datasets/b91de1b5dc2e5c3285468173b193a9f1/867330b231ff",
    "rows": 235_716,
    "val_rows": 26_204,
    "columns": [
        {"name": "scaled", "kind": "vector", "dtype": "float32", "shape": [11]},
        *(
            {"name": name, "kind": "scalar", "dtype": "float32", "shape": [1]}
            for name in ("carrier_index", "origin_index", "dest_index", "arr_delay")
        ),
    ],
}
PHASES = {"check": 0.4, "write": 7.9, "launch": 2.1, "import": 0.9, "prepare": 1.6, "train": 31.5, "publish": 0.7}


def epoch(
    number: int,
    ranks: int = 2,
    *,
    val: bool = True,
    wait: float = 0.04,
    lagging: int | None = None,
    turn: int = 100,
    metrics: Mapping[str, float] | None = None,
) -> EpochRecord:
    """Make an epoch in which steps wait for rows for some share of the time, one rank lags, and learning turns bad."""
    whole = 3.6 + 0.25 * math.sin(number) + (1.4 if number == 1 else 0)
    own = [whole * (0.72 + 0.03 * math.sin(3 * rank + number)) for rank in range(ranks)]
    if lagging is not None:
        own[lagging] = whole * 0.97
    times = tuple(
        RankTimes(
            rank,
            f"worker-{rank // 4 + 1}.example",
            seconds=whole,
            data_wait_s=wait * whole,
            allreduce_s=whole - own[rank],
            compute_s=own[rank] - wait * whole,
        )
        for rank in range(ranks)
    )
    train_loss = 4.2 + 6.5 * math.exp(-0.55 * number)
    val_loss = 4.6 + 6.1 * math.exp(-0.6 * number) + 0.16 * max(0, number - turn)
    found = {"loss": train_loss, "rmse": 3.1 * math.sqrt(train_loss) + 6}
    if val:
        found |= {"val_loss": val_loss, "val_rmse": 3.1 * math.sqrt(val_loss) + 6.1}
    return EpochRecord(
        epoch=number,
        started=STARTED + 12 + 4 * number,
        seconds=whole,
        rows=235_716,
        rows_per_s=235_716 / whole,
        learning_rate=0.002 * 0.5 ** max(0, (number - 3) // 2),
        metrics={**found, **(metrics or {})},
        validation_s=0.31 if val else None,
        ranks=times,
    )


def put_run(
    store: Store,
    run_id: str,
    epochs: list[EpochRecord] | None = None,
    progress: Progress | None = None,
    **fields: Any,
) -> None:
    """Write a run's files; fields replace those of a run that has finished."""
    record = {
        "run_id": run_id,
        "state": "finished",
        "started": STARTED,
        "ended": STARTED + 44.6,
        "cause": None,
        "kind": "keras",
        "params": PARAMS,
        "versions": VERSIONS,
        "data": DATA,
        "hosts": [{"rank": rank, "host": "worker-1.example", "local_rank": rank} for rank in range(2)],
        "phases": PHASES,
        "artefacts": {"model": f"runs/{run_id}/model.keras"},
        "attempts": [{"started": STARTED + 9, "ended": STARTED + 44, "cause": None, "ranks": 2}],
        "metrics": dict(epochs[-1].metrics) if epochs else {},
        "epoch": None,
    }
    store.publish_bytes(json.dumps(record | fields).encode(), "runs", run_id, "run.json")
    if epochs:
        write_history(store, run_id, epochs)
    if progress:
        write_progress(store, run_id, progress)
