"""How did a training job end? Prints the result that it left in its run, and ends with the job's own exit code.

In cluster mode spark-submit does not pass the exit code on: on YARN it ends with 1 for any failure, on Kubernetes with
0 for all.

    python outcome.py STORE RUN_ID [EARLIER]

EARLIER is what this program printed before the job was submitted: a driver that never started leaves the result of the
try before it as it was. That of a finished run stays right however often it is asked for.
"""

import json
import sys

from hvdspark import Store
from hvdspark.errors import StoreError

TRY_AGAIN = 75


def main(url: str, run_id: str, earlier: str = "") -> int:
    # What is left so where the driver did not come so far as to say anything: it was never started, or it was killed.
    cause = "the driver left no result; see the log of its container"
    try:
        result = Store.create(url).read_json("runs", run_id, "result.json")
    except StoreError as exc:
        result, cause = None, str(exc)
    if result is not None and result["exit_code"] != 0 and json.dumps(result) == earlier:
        result = None
    if result is None:
        result = {"run_id": run_id, "state": "failed", "exit_code": TRY_AGAIN, "cause": cause}
    print(json.dumps(result))
    return int(result["exit_code"])


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
