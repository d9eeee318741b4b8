#!/usr/bin/env bash
# Train on YARN, in cluster mode: the driver runs in the cluster, too. NOT TESTED HERE: no test of hvdspark has a YARN.
#
#   examples/submit/yarn.sh RUN_ID CONFIG [ARGUMENT OF hvdspark train ...]
#   RANKS=8 examples/submit/yarn.sh nightly-2027-01-31 job.yaml --since 2027-01-01 --warm-start champion
#
# README.md beside this file says what each setting is for. Run it again with the same RUN_ID after a failure: the run
# goes on from its last checkpoint.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
(($# >= 2)) || { echo "usage: ${0##*/} RUN_ID CONFIG [ARGUMENT ...]" >&2; exit 64; }
run_id=$1 config=$2
shift 2

# Every host mounts it at this path; or an address that fsspec and Spark both know, such as s3a://bucket/experiments.
STORE=${STORE:-/shared/experiments}
# From `ci/wheels --archive`; in HDFS, so that it is not sent anew with each job.
ARCHIVE=${ARCHIVE:-hdfs:///apps/hvdspark/env.tar.gz}
QUEUE=${QUEUE:-default}
RANKS=${RANKS:-4}
RANKS_PER_EXECUTOR=${RANKS_PER_EXECUTOR:-1}
((RANKS % RANKS_PER_EXECUTOR == 0)) || { echo "RANKS must be a multiple of RANKS_PER_EXECUTOR" >&2; exit 64; }

settings=(
  # All ranks run at the same time or not at all: Spark refuses that with dynamic allocation.
  --conf spark.dynamicAllocation.enabled=false
  --conf spark.executor.instances=$((RANKS / RANKS_PER_EXECUTOR))
  --conf spark.executor.cores="$RANKS_PER_EXECUTOR"
  --conf spark.task.cpus=1
  # Ranks are processes beside the JVM. YARN kills a container that holds more than memory and overhead together.
  --conf spark.executor.memory="${EXECUTOR_MEMORY:-4g}"
  --conf spark.executor.memoryOverhead="${EXECUTOR_OVERHEAD:-4g}"
  --conf spark.driver.memory="${DRIVER_MEMORY:-4g}"
  --conf spark.driver.memoryOverhead="${DRIVER_OVERHEAD:-2g}"
  # Whoever started this job tries again, with the same run id; YARN would not wait for the lease of the lost driver.
  --conf spark.yarn.maxAppAttempts=1
  # The environment, unpacked into the working folder of each container, the driver's too.
  --archives "$ARCHIVE#env"
  --conf spark.pyspark.python=./env/bin/python
  --conf spark.pyspark.driver.python=./env/bin/python
  --conf spark.yarn.appMasterEnv.PYSPARK_PYTHON=./env/bin/python
  --conf spark.executorEnv.PYSPARK_PYTHON=./env/bin/python
  --conf spark.executorEnv.TF_CPP_MIN_LOG_LEVEL=2
  # The configuration and its functions come to lie in the driver's working folder.
  --files "$config"
  --py-files "${PY_FILES:-$here/features.py}"
)

# A failed job makes spark-submit end with 1, whatever its own exit code is; outcome.py has that from the Store.
earlier=$("${PYTHON:-python}" "$here/outcome.py" "$STORE" "$run_id") || true # of the try before this one
submitted=0
"${SPARK_SUBMIT:-spark-submit}" --master yarn --deploy-mode cluster --name "hvdspark $run_id" --queue "$QUEUE" \
  "${settings[@]}" \
  "$here/hvdspark_job.py" --config "$(basename "$config")" --store "$STORE" --run-id "$run_id" "$@" || submitted=$?
((submitted <= 1)) || exit $submitted # there is no spark-submit, or a signal ended it
exec "${PYTHON:-python}" "$here/outcome.py" "$STORE" "$run_id" "$earlier"
