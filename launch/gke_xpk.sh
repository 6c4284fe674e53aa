#!/usr/bin/env bash
# A GKE cluster that xpk made: launch/gke_xpk.sh COMMAND
#
#   submit     starts the workload; GKE starts all its hosts again after a preemption (exit code 75), a lost host or a
#              crash, at most MAX_RESTARTS times, and each start goes on from the last checkpoint
#   monitor    the workload's line in the queue, then the first host's log, followed
#   resume     waits until the workload has finished; where it did not complete, submits it again, until it is done
#   stop       deletes the workload; its hosts save a checkpoint first
#
# Settings, by environment:
#   PROJECT ZONE CLUSTER   of the cluster
#   WORKLOAD               a name for the run
#   TPU_TYPE               such as v5litepod-16, v6e-256
#   SLICES                 1
#   CONFIG WORKDIR         such as configs/dreamlite.py:t2i_256 and /gcs/runs/t2i_256
#                          (compiled programs are kept beside it, in .jax_cache)
#   STORAGE                name of the storage attached by xpk storage attach --type=gcsfuse --mount-point=/gcs
#   TRAIN_ARGS             further arguments, such as "--config.mesh.fsdp=16"
#   IMAGE                  base image (python:3.11); xpk puts this folder into it
#   SECRETS_FILE           optional: NAME=value lines, handed to xpk as a file and never put on a command line
#   MAX_RESTARTS           of one submission (50)
#   MAX_SUBMISSIONS        of resume (10)
#   DRY_RUN=1              print every command, run none
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=SCRIPTDIR/pod.sh
. launch/pod.sh

xpk_() { do_run xpk workload "$@" --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER"; }

submit() {
  want PROJECT ZONE CLUSTER WORKLOAD TPU_TYPE CONFIG WORKDIR STORAGE
  local train cache options=()
  cache=$(quoted "$(dirname "$WORKDIR")/.jax_cache") # beside the workdir: a pod's own disk goes with the pod
  # shellcheck disable=SC2086 # TRAIN_ARGS is a list of words
  train=$(quoted --config "$CONFIG" --workdir "$WORKDIR" ${TRAIN_ARGS:-})
  [ -z "${SECRETS_FILE:-}" ] || options+=(--env-file="$SECRETS_FILE")
  xpk_ create --workload="$WORKLOAD" --tpu-type="$TPU_TYPE" --num-slices="${SLICES:-1}" \
    --base-docker-image="${IMAGE:-python:3.11}" --script-dir="$PWD" --storage="$STORAGE" \
    --max-restarts="${MAX_RESTARTS:-50}" --restart-on-exit-codes="$RETRY_CODE" \
    --termination-grace-period-seconds=300 "${options[@]}" \
    --command="launch/setup.sh tpu && . launch/env.sh && export JAX_COMPILATION_CACHE_DIR=$cache && exec \$VENV/bin/python -m dreamlite_jax.train $train"
}

monitor() {
  want PROJECT ZONE CLUSTER WORKLOAD
  xpk_ list --filter-by-job="$WORKLOAD"
  do_run kubectl logs --follow --tail=100 --all-containers \
    --selector="jobset.sigs.k8s.io/jobset-name=$WORKLOAD,batch.kubernetes.io/job-completion-index=0,jobset.sigs.k8s.io/job-index=0"
}

# Whether the workload has finished well: 0; 125 where it ended without completing, 1 where there is none.
finished() { xpk_ list --wait-for-job-completion="$WORKLOAD"; }

resume() {
  want PROJECT ZONE CLUSTER WORKLOAD TPU_TYPE CONFIG WORKDIR STORAGE
  local round
  for ((round = 0; round < ${MAX_SUBMISSIONS:-10}; round++)); do
    if finished && [ "${DRY_RUN:-}" != 1 ]; then return 0; fi
    stop || true # there may be none
    submit
    [ "${DRY_RUN:-}" != 1 ] || return 0 # one round of the plan
  done
  echo "error: $WORKLOAD has not completed after ${MAX_SUBMISSIONS:-10} submissions" >&2
  return 1
}

stop() {
  want PROJECT ZONE CLUSTER WORKLOAD
  xpk_ delete --workload="$WORKLOAD" --force
}

case ${1:-help} in
  submit | monitor | resume | stop) "$1" ;;
  help | --help | -h) usage ;;
  *) echo "error: $1 is not a command (see launch/gke_xpk.sh help)" >&2 && exit 2 ;;
esac
