"""Ends as it is told to, in the manner of ``hvdspark train``, but trains nothing.

``--set codes=[75, 0]`` are the exit codes of its tries; ``--config`` names the folder where they are counted.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType

options = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
run_id = options["--run-id"]
folder = Path(options["--config"])
_, _, said = options["--set"].partition("=")


def result(code: int) -> str:
    cause = None if code == 0 else f"rank 1 on h: ValueError: no {code} \u00fc"
    state = {0: "finished", 130: "interrupted"}.get(code, "failed")
    return json.dumps(
        {"run_id": run_id, "state": state, "metrics": {"val_loss": 0.5}, "cause": cause, "exit_code": code}
    )


def hang() -> None:
    """Use Spark until somebody ends it."""
    from pyspark.sql import SparkSession

    def told(number: int, frame: FrameType | None) -> None:
        print(result(130), flush=True)
        os._exit(130)

    signal.signal(signal.SIGTERM, told)
    context = SparkSession.builder.getOrCreate().sparkContext
    context.parallelize([0], 1).foreach(lambda _: None)
    (folder / "pid").write_text(str(os.getpid()))
    signal.pause()


if said == "hang":
    hang()
tries = folder / run_id
tries.write_text(tries.read_text() + "x" if tries.exists() else "x")
code = json.loads(said)[len(tries.read_text()) - 1]
print("{'not': json} and {\"other\": 1}", flush=True)
if code not in (None, 3):
    print(f"epoch 1 {result(code)}" if code == 75 else result(code), flush=True)
print("26/11/27 00:00:00 INFO ShutdownHookManager: Shutdown hook called", file=sys.stderr, flush=True)
sys.exit(code or 0)
