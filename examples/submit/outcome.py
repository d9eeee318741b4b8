"""How did a training job end? Prints the result that it left in its run, and ends with the job's own exit code.

In cluster mode spark-submit does not pass the exit code on: on YARN it ends with 1 for any failure, on Kubernetes with
0 for all.

    python outcome.py STORE RUN_ID
"""

import json
import sys

from hvdspark import Store

TRY_AGAIN = 75


def main(url: str, run_id: str) -> int:
    result = Store.create(url).read_json("runs", run_id, "result.json")
    if result is None:
        # The driver did not come so far as to say anything: it was never started, or it was killed.
        cause = "the driver left no result; see the log of its container"
        result = {"run_id": run_id, "state": "failed", "exit_code": TRY_AGAIN, "cause": cause}
    print(json.dumps(result))
    return int(result["exit_code"])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
