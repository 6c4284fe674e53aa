# shellcheck shell=bash
# Sourced by the pod launchers: settings, dry runs, and what both ask of a training run.

# Exit code of a run that was told to stop and has saved: start it again.
RETRY_CODE=$(sed -n 's/^PREEMPTED = \([0-9]*\).*/\1/p' "$(dirname "${BASH_SOURCE[0]}")/../dreamlite_jax/exit_codes.py")
export RETRY_CODE

# want NAME…: stops with one line that lists every setting that is missing.
want() {
  local name missing=()
  for name in "$@"; do [ -n "${!name:-}" ] || missing+=("$name"); done
  [ ${#missing[@]} -eq 0 ] && return 0
  echo "error: set ${missing[*]} (see $(basename "$0") help)" >&2
  exit 2
}

# quoted WORD…: the words as a shell takes them, quoted where that is needed.
quoted() {
  local word text=''
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]] || word=\'${word//\'/\'\\\'\'}\'
    text+=" $word"
  done
  echo "${text# }"
}

# do_run COMMAND…: runs it, or with DRY_RUN=1 prints it.
do_run() {
  if [ "${DRY_RUN:-}" = 1 ]; then quoted "$@"; else "$@"; fi
}

# The header of the script, without its comment marks.
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }
