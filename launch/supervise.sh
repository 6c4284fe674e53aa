#!/usr/bin/env bash
# Runs on every host of a pod: launch/supervise.sh LOG COMMAND…. Starts the command again when it was preempted (exit
# code 75) or died of a signal (128 and above), the latter at most MAX_CRASHES times in a row (5). TERM is passed on,
# and then nothing is started again. LOG.pid holds our process while this runs, LOG.exit the last exit code afterwards.
set -uo pipefail
# shellcheck source=SCRIPTDIR/pod.sh
. "$(dirname "$0")/pod.sh"
log=$1
shift
rm -f "$log.exit"
echo $$ >"$log.pid"
child='' stopped='' interrupted=''
trap 'stopped=1 interrupted=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' TERM INT

crashes=0
while :; do
  "$@" >>"$log" 2>&1 &
  child=$!
  while :; do # a trapped signal ends `wait`, not the child
    interrupted=''
    wait "$child"
    code=$?
    [ -n "$interrupted" ] || break
  done
  echo "$(date -u +%FT%TZ) exit code $code" >>"$log"
  if [ "$code" -eq "$RETRY_CODE" ]; then
    crashes=0
  elif [ "$code" -ge 128 ]; then
    crashes=$((crashes + 1))
  else
    break
  fi
  if [ -n "$stopped" ] || [ "$crashes" -gt "${MAX_CRASHES:-5}" ]; then break; fi
  sleep "${RETRY_SECONDS:-10}"
  if [ -n "$stopped" ]; then break; fi
done
echo "$code" >"$log.exit.tmp" && mv "$log.exit.tmp" "$log.exit"
rm -f "$log.pid"
exit "$code"
