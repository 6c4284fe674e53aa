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

# secrets WRITE: reads SECRETS_FILE, whose lines are NAME=value, and calls WRITE NAME VALUE for each. A value is what stands
# between the first "=" and the end of its line, as it stands there: one rule for every launcher. Stops with one line, which
# never shows a value, at anything that a shell and a YAML file would read in two ways.
secrets() {
  local line name number=0 fault=''
  [ -f "$SECRETS_FILE" ] || { echo "error: SECRETS_FILE $SECRETS_FILE does not exist" >&2 && exit 2; }
  while IFS= read -r line || [ -n "$line" ]; do
    number=$((number + 1))
    [[ $line =~ ^[[:space:]]*(#|$) ]] && continue
    name=${line%%=*}
    if [[ $line =~ ^[[:space:]]*export[[:space:]] ]]; then
      fault="begins with export; write NAME=value"
    elif [[ $line != *=* || ! $name =~ ^[A-Za-z_][A-Za-z0-9_]*$ ]]; then
      fault="is not NAME=value"
    elif [[ ${line#*=} =~ ^[\"\'] ]]; then
      fault="puts the value of $name into quotes, which would become part of it; write it without"
    elif [[ ${line#*=} =~ [[:cntrl:]] ]]; then
      fault="has a control character in the value of $name, such as a tab or the end of line of Windows"
    fi
    [ -z "$fault" ] || { echo "error: SECRETS_FILE $SECRETS_FILE line $number $fault" >&2 && exit 2; }
    "$1" "$name" "${line#*=}"
  done <"$SECRETS_FILE"
}

# spell WRITE: puts SECRETS_FILE, spelled by WRITE, into a file that only its owner can read and that goes with this script;
# SPELLED is its name. A dry run looks at the lines and writes nothing.
spell() {
  SPELLED=$SECRETS_FILE
  if [ "${DRY_RUN:-}" = 1 ]; then
    secrets true
    return
  fi
  SPELLED=$(umask 077 && mktemp)
  trap 'rm -f "$SPELLED"' EXIT
  secrets "$1" >"$SPELLED"
}

# need TOOL…: stops with one line that lists every program that is missing.
need() {
  local tool missing=()
  [ "${DRY_RUN:-}" != 1 ] || return 0
  for tool in "$@"; do command -v "$tool" >/dev/null || missing+=("$tool"); done
  [ ${#missing[@]} -eq 0 ] && return 0
  echo "error: install ${missing[*]} first (see launch/README.md)" >&2
  exit 2
}

# The header of the script, without its comment marks.
usage() { sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$0"; }
