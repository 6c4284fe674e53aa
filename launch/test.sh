#!/usr/bin/env bash
# From a fresh machine to tests passed: launch/test.sh [--python 3.13] [--slow] [pytest arguments].
# --python makes an environment of its own, .venv-3.13, beside that of the other commands.
set -euo pipefail
# shellcheck source=SCRIPTDIR/env.sh
. "$(dirname "$0")/env.sh"
if [ "${1:-}" = --python ]; then
  wanted=${2:?"--python wants a version such as 3.13"}
  PYTHON=$(find_python "$wanted") || { echo "error: --python $wanted: python$wanted not found" >&2 && exit 2; }
  export PYTHON VENV=${DREAMLITE_VENV:-$ROOT/.venv-$wanted} && export DREAMLITE_VENV=$VENV
  shift 2
fi
"$ROOT/launch/setup.sh" demo,convert,test
cd "$ROOT"
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
unset XLA_FLAGS  # the tests choose their own number of devices
# Most tests trace, compile or wait on one core, so two files run at a time, in order: otherwise the files of few tests come
# last, and the longest of all is one. The slow tests need the memory for themselves.
workers=2
case " $* " in *" --slow "*) workers=0 ;; esac
exec "$VENV/bin/python" -m pytest -n "$workers" --dist loadfile --no-loadscope-reorder "$@"
