#!/usr/bin/env bash
# Train on Kubernetes, in cluster mode: driver and executors are pods. NOT TESTED HERE: no test of hvdspark has a
# Kubernetes.
#
#   kubectl apply -f examples/submit/kubernetes.yaml     # once: account, Store, network policy
#   kubectl -n hvdspark create configmap hvdspark-job --from-file=job.yaml --from-file=features.py
#   MASTER=k8s://https://host:6443 IMAGE=host/hvdspark:0.1.0 examples/submit/kubernetes.sh nightly-2027-01-31
#
# README.md beside this file says what each setting is for, and how the image is made. Run it again with the same RUN_ID
# after a failure: the run goes on from its last checkpoint.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
(($# >= 1)) || { echo "usage: ${0##*/} RUN_ID [ARGUMENT OF hvdspark train ...]" >&2; exit 64; }
run_id=$1
shift
: "${MASTER:?the address of the API server, such as k8s://https://host:6443}"
: "${IMAGE:?the image that the Dockerfile beside this file makes}"

NAMESPACE=${NAMESPACE:-hvdspark}
# In all pods the volume of kubernetes.yaml; this host mounts it, too, or STORE_HERE is how it reaches the same folder.
STORE=${STORE:-/shared/experiments}
RANKS=${RANKS:-4}
# Ranks of one pod share memory; those of different pods talk over the network, even on one node.
RANKS_PER_EXECUTOR=${RANKS_PER_EXECUTOR:-2}
((RANKS % RANKS_PER_EXECUTOR == 0)) || { echo "RANKS must be a multiple of RANKS_PER_EXECUTOR" >&2; exit 64; }

settings=(
  --conf spark.kubernetes.namespace="$NAMESPACE"
  --conf spark.kubernetes.container.image="$IMAGE"
  --conf spark.kubernetes.authenticate.driver.serviceAccountName=hvdspark
  --conf spark.kubernetes.driver.podTemplateFile="$here/driver-pod.yaml"
  --conf spark.kubernetes.executor.podTemplateFile="$here/executor-pod.yaml"
  --conf spark.kubernetes.submission.waitAppCompletion=true
  # All ranks run at the same time or not at all: Spark refuses that with dynamic allocation.
  --conf spark.dynamicAllocation.enabled=false
  --conf spark.executor.instances=$((RANKS / RANKS_PER_EXECUTOR))
  --conf spark.executor.cores="$RANKS_PER_EXECUTOR"
  --conf spark.task.cpus=1
  # The pod's limit is memory and overhead together; ranks, TensorFlow and /dev/shm live in the overhead.
  --conf spark.executor.memory="${EXECUTOR_MEMORY:-4g}"
  --conf spark.executor.memoryOverhead="${EXECUTOR_OVERHEAD:-6g}"
  --conf spark.driver.memory="${DRIVER_MEMORY:-4g}"
  --conf spark.driver.memoryOverhead="${DRIVER_OVERHEAD:-2g}"
  --conf spark.pyspark.python=/opt/hvdspark/bin/python
  --conf spark.pyspark.driver.python=/opt/hvdspark/bin/python
  # Ranks inherit the environment of their executor. Values of secrets are in no setting and in no log.
  --conf spark.executorEnv.TF_CPP_MIN_LOG_LEVEL=2
)
if [[ -n ${SECRET:-} ]]; then # the name of a Secret with the keys access-key and secret-key, for a Store on S3
  for role in driver executor; do
    settings+=(
      --conf "spark.kubernetes.$role.secretKeyRef.AWS_ACCESS_KEY_ID=$SECRET:access-key"
      --conf "spark.kubernetes.$role.secretKeyRef.AWS_SECRET_ACCESS_KEY=$SECRET:secret-key"
    )
  done
fi

# spark-submit ends with 0 here even when the driver failed (SPARK-26365); outcome.py has the exit code from the Store.
earlier=$("${PYTHON:-python}" "$here/outcome.py" "${STORE_HERE:-$STORE}" "$run_id") || true # of the try before this one
submitted=0
"${SPARK_SUBMIT:-spark-submit}" --master "$MASTER" --deploy-mode cluster --name "hvdspark-$run_id" \
  "${settings[@]}" \
  local:///opt/hvdspark/submit/hvdspark_job.py \
  --config /opt/job/job.yaml --store "$STORE" --run-id "$run_id" "$@" || submitted=$?
((submitted <= 1)) || exit $submitted # there is no spark-submit, or a signal ended it
exec "${PYTHON:-python}" "$here/outcome.py" "${STORE_HERE:-$STORE}" "$run_id" "$earlier"
