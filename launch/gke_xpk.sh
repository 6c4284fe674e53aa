#!/usr/bin/env bash
# A GKE cluster that xpk made: launch/gke_xpk.sh COMMAND
#
#   submit     starts the workload; GKE starts all its hosts again after a preemption (exit code 75), a lost host or a
#              crash, at most MAX_RESTARTS times, and each start goes on from the last checkpoint
#   monitor    the workload's line in the queue, then the first host's log, followed
#   resume     waits until the workload has finished; where it failed or is gone, submits it again, until it is done
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
#   SECRETS_FILE           optional: NAME=value lines, values as they stand, handed to xpk as a file and never put on a
#                          command line. They stand in clear in the JobSet: whoever may read JobSets there can read them
#   MAX_RESTARTS           of one submission (50)
#   MAX_SUBMISSIONS        of resume (10)
#   ASK_SECONDS            between two questions of resume (60)
#   DRY_RUN=1              print every command, run none
#   DRY_RUN_STATE          the workload's state to assume in a dry run (Failed; Completed; empty: no such workload)
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=SCRIPTDIR/pod.sh
. launch/pod.sh

xpk_() { do_run xpk workload "$@" --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER"; }

# for_yaml NAME VALUE: as xpk pastes it between double quotes into YAML, and as Kubernetes then reads its dollar signs.
for_yaml() {
  local value=${2//\\/\\\\}
  value=${value//\"/\\\"}
  printf '%s=%s\n' "$1" "${value//\$/\$\$}"
}

submit() {
  want PROJECT ZONE CLUSTER WORKLOAD TPU_TYPE CONFIG WORKDIR STORAGE
  need xpk kubectl crane
  aim
  namesakes
  start
}

start() {
  local train cache options=()
  cache=$(quoted "$(dirname "$WORKDIR")/.jax_cache") # beside the workdir: a pod's own disk goes with the pod
  # shellcheck disable=SC2086 # TRAIN_ARGS is a list of words
  train=$(quoted --config "$CONFIG" --workdir "$WORKDIR" ${TRAIN_ARGS:-})
  if [ -n "${SECRETS_FILE:-}" ]; then
    spell for_yaml
    options+=(--env-file="$SPELLED")
  fi
  xpk_ create --workload="$WORKLOAD" --tpu-type="$TPU_TYPE" --num-slices="${SLICES:-1}" \
    --base-docker-image="${IMAGE:-python:3.11}" --script-dir="$PWD" --storage="$STORAGE" \
    --max-restarts="${MAX_RESTARTS:-50}" --restart-on-exit-codes="$RETRY_CODE" \
    --termination-grace-period-seconds=300 "${options[@]}" \
    --command="launch/setup.sh tpu && . launch/env.sh && export JAX_COMPILATION_CACHE_DIR=$cache && exec \$VENV/bin/python -m dreamlite_jax.train $train"
}

# Shows the workload; xpk also points kubectl at this cluster, which every question to kubectl below needs.
aim() { xpk_ list --filter-by-job="$WORKLOAD"; }

monitor() {
  want PROJECT ZONE CLUSTER WORKLOAD
  aim
  do_run kubectl logs --follow --tail=100 --all-containers \
    --selector="jobset.sigs.k8s.io/jobset-name=$WORKLOAD,batch.kubernetes.io/job-completion-index=0,jobset.sigs.k8s.io/job-index=0"
}

# What the cluster itself says of the JobSet of just this name: Completed, Failed, unfinished, or nothing where there is
# none. Fails where the cluster does not answer, which says nothing of the workload.
state() {
  local seen command=(kubectl get jobset "$WORKLOAD" --ignore-not-found
    '--output=jsonpath={.metadata.name}{range .status.conditions[?(@.status=="True")]} {.type}{end}')
  if [ "${DRY_RUN:-}" = 1 ]; then
    do_run "${command[@]}" >&2
    echo "${DRY_RUN_STATE-Failed}"
    return
  fi
  seen=$("${command[@]}") || return
  case "$seen " in
    " ") ;;
    *" Completed "*) echo Completed ;;
    *" Failed "*) echo Failed ;;
    *) echo unfinished ;;
  esac
}

# Refuses a name that is the beginning of another workload's, or begins with one: xpk looks workloads up by how they begin.
namesakes() {
  local names name
  names=$(do_run kubectl get jobsets --output=name)
  [ "${DRY_RUN:-}" != 1 ] || { echo "$names" && return; }
  for name in $names; do
    name=${name#*/}
    [ "$name" != "$WORKLOAD" ] || continue
    [[ $name != "$WORKLOAD"* && $WORKLOAD != "$name"* ]] && continue
    echo "error: WORKLOAD $WORKLOAD and this cluster's workload $name begin alike, and xpk can take one for the other;" \
      "choose a name that is not the beginning of another" >&2
    exit 2
  done
}

resume() {
  want PROJECT ZONE CLUSTER WORKLOAD TPU_TYPE CONFIG WORKDIR STORAGE
  need xpk kubectl crane
  local now round=0
  aim
  namesakes
  while :; do
    if ! now=$(state); then
      echo "the cluster does not answer; asking again in ${ASK_SECONDS:-60} s" >&2
    elif [ "$now" = Completed ]; then
      echo "$WORKLOAD has completed" >&2
      return 0
    elif [ "$now" != unfinished ]; then # Failed, or there is none
      if [ "$round" -ge "${MAX_SUBMISSIONS:-10}" ]; then
        echo "error: $WORKLOAD has not completed after $round submissions" >&2
        return 1
      fi
      round=$((round + 1))
      if [ -z "$now" ] || stop; then start || echo "$WORKLOAD could not be submitted" >&2; fi
      [ "${DRY_RUN:-}" != 1 ] || return 0 # one round of the plan
    fi
    sleep "${ASK_SECONDS:-60}"
  done
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
