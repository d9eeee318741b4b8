"""A cluster whose connections Spark authenticates: a real one, with a master and a worker of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

# In a process of its own, because this one's JVM has a session without such settings.
PROGRAM = """
import json
import hvdspark
from hvdspark.errors import ParamError
from pyspark.sql import SparkSession

def session(master):
    builder = SparkSession.builder.master(master).config("spark.ui.enabled", "false")
    for name in ("spark.driver.host", "spark.driver.bindAddress"):
        builder = builder.config(name, "127.0.0.1")
    builder = builder.config("spark.authenticate", "true").config("spark.authenticate.secret", "of this test")
    found = builder.getOrCreate()
    found.sparkContext.setLogLevel("OFF")
    return found

first = session("local[1]")
context = first.sparkContext
cluster = context._jvm.org.apache.spark.deploy.LocalSparkCluster(1, 1, 1024, context._jsc.sc().conf())
[address] = cluster.start()
first.stop()
second = session(address)
try:
    hvdspark.run(lambda: "ran", num_proc=1)
    refused = ""
except ParamError as exc:
    refused = str(exc)
jobs = len(second.sparkContext.statusTracker().getJobIdsForGroup(None))
ran = hvdspark.run(lambda: "ran", num_proc=1, allow_insecure_transport=True)
print("answer", json.dumps([address, refused, jobs, ran]))
second.stop()
cluster.stop()
"""


def test_it_is_refused_before_any_job_unless_it_is_allowed() -> None:
    env = os.environ | {"PYSPARK_PYTHON": sys.executable, "SPARK_LOCAL_IP": "127.0.0.1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    [answer] = [line for line in done.stdout.splitlines() if line.startswith("answer ")]
    address, refused, jobs, ran = json.loads(answer.removeprefix("answer "))
    assert address.startswith("spark://")
    assert refused.startswith("spark.authenticate=true: ")
    assert "allow_insecure_transport=True" in refused
    assert jobs == 0
    assert ran == ["ran"]
