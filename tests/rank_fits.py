"""Fits without Spark: rows in a Store, and the ranks in processes of their own, which meet over Gloo."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cloudpickle
import keras
import numpy as np
import pyarrow as pa
from gloo_ranks import process, two_gloo_ranks, warm_command
from hvdspark.estimators.keras import codec
from hvdspark.estimators.keras.spec import KerasSpec

from hvdspark.data.partitions import Split
from hvdspark.data.planning import FitDraft
from hvdspark.plan import BatchSpec, ColumnSpec, FitPlan, TensorSpec, TrainResult

COLUMNS = (ColumnSpec("x", "array", "float32", None), ColumnSpec("y", "scalar", "float32"))

ALONE = {
    f"HOROVOD_{name}": value
    for name, value in {
        "RANK": "0",
        "SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_SIZE": "1",
        "CROSS_RANK": "0",
        "CROSS_SIZE": "1",
        "HOSTNAME": "host",
    }.items()
}

RANK = """
import os, sys, cloudpickle
from pathlib import Path
from hvdspark.estimators.keras.trainer import train
sys.path.insert(0, os.environ["TESTS"])
plan, spec, before = cloudpickle.loads(Path(os.environ["FIT"]).read_bytes())
before()
result = train(plan, spec)
if result is not None:
    Path(os.environ["FIT"]).with_suffix(".result").write_bytes(cloudpickle.dumps(result))
"""


def rows(count: int, width: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Make features of shape ``(count, width)``, and labels that are linear in them."""
    random = np.random.default_rng(seed)
    x = random.normal(size=(count, width)).astype("f4")
    return x, (x @ np.linspace(-1, 2, width)).astype("f4")


def fit_plan(
    write_dataset: Callable[..., Any], data: tuple[np.ndarray, np.ndarray], *, size: int = 1, **changes: Any
) -> FitPlan:
    """Write rows, and plan a fit on them; ``changes`` are fields of the draft, and ``validation``."""
    x, y = data
    split = Split(fraction=changes.pop("validation", 0.0))
    batch = pa.RecordBatch.from_pydict({"x": pa.array(list(x), pa.list_(pa.float32())), "y": y})
    written = write_dataset(COLUMNS, [[batch]], split)
    written.store.make_folder("runs/run")
    fields: dict[str, Any] = {
        "run_id": "run",
        "batch_rows": 32,
        "val_batch_rows": 32,
        "epochs": 2,
        "shuffle": True,
        "seed": 0,
        **changes,
    }
    draft = FitDraft(
        store=written.store.ref(),
        columns=COLUMNS,
        batch=BatchSpec((TensorSpec(("x",), (x.shape[1],), "float32"),), (TensorSpec(("y",), (1,)),)),
        split=split,
        size=size,
        **fields,
    )
    return draft.complete(written.manifest, written.store.ref(), written.dataset)


def keras_spec(model: keras.Model, *callbacks: Any, **changes: Any) -> KerasSpec:
    """Say how a compiled model is trained; ``changes`` are fields of the result."""
    fields: dict[str, Any] = {
        "model": codec.model_to_bytes(model),
        "compiling": {},
        "custom_objects": {},
        "callbacks": callbacks,
        "learning_rate": None,
        "scale_learning_rate": False,
        "allreduce": "auto",
        "compression": "none",
        "passes_per_step": 1,
        "best_of": None,
        "use_gpu": False,
        **changes,
    }
    return KerasSpec(**fields)


def run_ranks(
    folder: Path, plan: FitPlan, spec: KerasSpec, before: Callable[[], Any] = lambda: None, **environment: str
) -> tuple[TrainResult | None, list[int], str]:
    """Train; returns what rank 0 answered, the exit codes of the ranks, and what they wrote to standard error."""
    fit = folder / "fit"
    fit.write_bytes(cloudpickle.dumps((plan, spec, before)))
    fit.with_suffix(".result").unlink(missing_ok=True)
    settings = {"FIT": str(fit), "TESTS": str(Path(__file__).parent), "KERAS_BACKEND": "tensorflow", **environment}
    with contextlib.ExitStack() as stack:
        ranks: Sequence[Any]
        if plan.train.size == 1:
            ranks = [stack.enter_context(process(*warm_command(RANK), **ALONE, **settings))]
        else:
            ranks = stack.enter_context(two_gloo_ranks(RANK, warm=True, **settings))
        errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    found = fit.with_suffix(".result")
    result = cloudpickle.loads(found.read_bytes()) if found.exists() else None
    return result, [rank.returncode for rank in ranks], "\n".join(errors)


def stop_here() -> None:
    """End this rank at once, as a kill would."""
    os.kill(os.getpid(), 9)
