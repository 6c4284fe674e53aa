#!/usr/bin/env bash
# Cloud TPU VMs by queued resources: launch/tpu_vm.sh COMMAND
#
#   create     asks for the slices and waits until they are there
#   setup      copies the committed code to every host, installs it, mounts the bucket on /gcs
#   preflight  launch/preflight.py on every host
#   run        starts training on every host, in the background; it is started again after a preemption that leaves the
#              hosts, and goes on from its last checkpoint
#   logs       follows the first host's log
#   status     the queue's state, and of every host: running, or its last exit code
#   resume     run again; where the slices were taken away, asks for new ones and sets them up first
#   stop       ends training on every host; it saves a checkpoint first
#   delete     gives the slices back
#
# Settings, by environment:
#   PROJECT ZONE NAME      of the queued resource
#   ACCELERATOR_TYPE       such as v5litepod-16, v6e-256
#   RUNTIME_VERSION        such as v2-alpha-tpuv5-lite (v5e), v2-alpha-tpuv6e, v2-alpha-tpuv5 (v5p)
#   SLICES                 1
#   PROVISIONING           on-demand (default), spot or reserved
#   BUCKET                 without gs://; a bucket with a hierarchical namespace, mounted on /gcs on every host
#   CONFIG WORKDIR         such as configs/dreamlite.py:t2i_256 and /gcs/runs/t2i_256
#   TRAIN_ARGS             further arguments, such as "--config.mesh.fsdp=16"
#   SECRETS_FILE           optional: NAME=value lines, values as they stand, copied to the hosts as a file and never put
#                          on a command line
#   SERVICE_ACCOUNT        optional
#   DRY_RUN=1              print every command, run none
#   DRY_RUN_STATE          the queue's state to assume in a dry run (ACTIVE; empty: no such queued resource)
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=SCRIPTDIR/pod.sh
. launch/pod.sh
SLICES=${SLICES:-1}
REMOTE=dreamlite_jax # under the home of every host
LOG=dreamlite.log

queue() { do_run gcloud compute tpus queued-resources "$1" "${@:2}" --project="$PROJECT" --zone="$ZONE"; }
# shellcheck disable=SC2153 # NAME is a setting
ssh_all() { queue ssh "$NAME" --node=all --worker=all --command="$1"; }
copy() { queue scp "$1" "$NAME:$2" --node=all --worker=all; } # FILE REMOTE

# CREATING, ACTIVE, SUSPENDED, …; nothing where there is no such queued resource.
state() {
  local command=(gcloud compute tpus queued-resources describe "$NAME" --project="$PROJECT" --zone="$ZONE" "--format=value(state.state)")
  if [ "${DRY_RUN:-}" = 1 ]; then
    do_run "${command[@]}" >&2
    echo "${DRY_RUN_STATE-ACTIVE}"
  else
    "${command[@]}" 2>/dev/null || true
  fi
}

create() {
  want PROJECT ZONE NAME ACCELERATOR_TYPE RUNTIME_VERSION
  local options=(--accelerator-type="$ACCELERATOR_TYPE" --runtime-version="$RUNTIME_VERSION")
  if [ "$SLICES" = 1 ]; then
    options+=(--node-id="$NAME")
  else
    options+=(--node-count="$SLICES" --node-prefix="$NAME")
  fi
  case ${PROVISIONING:-on-demand} in
    on-demand) ;;
    spot) options+=(--spot) ;;
    reserved) options+=(--reserved) ;;
    *) echo "error: PROVISIONING is $PROVISIONING; it must be on-demand, spot or reserved" >&2 && exit 2 ;;
  esac
  [ -z "${SERVICE_ACCOUNT:-}" ] || options+=(--service-account="$SERVICE_ACCOUNT")
  queue create "$NAME" "${options[@]}"
  await
}

# Waits until the slices are there.
await() {
  local now
  while now=$(state) && [ "$now" != ACTIVE ] && [ "${DRY_RUN:-}" != 1 ]; do
    case $now in FAILED | SUSPENDED) echo "error: $NAME is $now; delete it and create it again" >&2 && exit 1 ;; esac
    echo "$NAME is ${now:-unknown}; asking again in a minute" >&2
    sleep 60
  done
}

# for_shell NAME VALUE: an assignment that a shell reads to just this value.
for_shell() { printf "%s='%s'\n" "$1" "${2//\'/\'\\\'\'}"; }

setup() {
  want PROJECT ZONE NAME BUCKET
  local archive=/tmp/$NAME.tar.gz
  do_run git archive --format=tar.gz --output="$archive" HEAD
  copy "$archive" "$REMOTE.tar.gz"
  if [ -n "${SECRETS_FILE:-}" ]; then
    spell for_shell
    copy "$SPELLED" .dreamlite_secrets
    ssh_all 'chmod 600 .dreamlite_secrets'
  fi
  ssh_all "mkdir -p $REMOTE && tar -xzf $REMOTE.tar.gz -C $REMOTE && $REMOTE/launch/host_setup.sh $(quoted "$BUCKET")"
}

# on_hosts COMMAND: the shell line that runs it in the checkout, with our environment and the secrets.
on_hosts() {
  echo "cd $REMOTE && set -a && { [ ! -f ~/.dreamlite_secrets ] || . ~/.dreamlite_secrets; } && set +a && . launch/env.sh && export JAX_COMPILATION_CACHE_DIR=~/.jax_cache && $1"
}

preflight() {
  want PROJECT ZONE NAME CONFIG WORKDIR
  # shellcheck disable=SC2086 # TRAIN_ARGS is a list of words
  ssh_all "$(on_hosts "\$VENV/bin/python launch/preflight.py $(quoted --config "$CONFIG" --workdir "$WORKDIR" ${TRAIN_ARGS:-})")"
}

run() {
  want PROJECT ZONE NAME CONFIG WORKDIR
  local train
  # shellcheck disable=SC2086
  train=$(quoted --config "$CONFIG" --workdir "$WORKDIR" ${TRAIN_ARGS:-})
  ssh_all "$(on_hosts "if kill -0 \$(cat ~/$LOG.pid) 2>/dev/null; then echo already running; else setsid nohup launch/supervise.sh ~/$LOG \$VENV/bin/python -m dreamlite_jax.train $train </dev/null >/dev/null 2>&1 & fi")"
}

resume() {
  want PROJECT ZONE NAME ACCELERATOR_TYPE RUNTIME_VERSION BUCKET CONFIG WORKDIR
  case $(state) in
    ACTIVE) ;;
    '')
      create
      setup
      ;;
    SUSPEND* | FAILED)
      delete
      create
      setup
      ;;
    *) # still in the queue
      await
      setup
      ;;
  esac
  run
}

logs() {
  want PROJECT ZONE NAME
  queue ssh "$NAME" --node=0 --worker=0 --command="tail -n 100 -F $LOG"
}

status() {
  want PROJECT ZONE NAME
  local now
  now=$(state)
  echo "$NAME: ${now:-no such queued resource}"
  [ "$now" != ACTIVE ] ||
    ssh_all "if kill -0 \$(cat $LOG.pid 2>/dev/null) 2>/dev/null; then echo \$(hostname): running; else echo \$(hostname): exit code \$(cat $LOG.exit 2>/dev/null || echo none); fi; tail -n 1 $LOG"
}

stop() {
  want PROJECT ZONE NAME
  ssh_all "kill -TERM \$(cat $LOG.pid) && while [ -f $LOG.pid ]; do sleep 1; done; cat $LOG.exit"
}

delete() {
  want PROJECT ZONE NAME
  queue delete "$NAME" --force --quiet
}

case ${1:-help} in
  create | setup | preflight | run | logs | status | resume | stop | delete) "$1" ;;
  help | --help | -h) usage ;;
  *) echo "error: $1 is not a command (see launch/tpu_vm.sh help)" >&2 && exit 2 ;;
esac
