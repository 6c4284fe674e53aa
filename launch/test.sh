#!/usr/bin/env bash
# From a fresh machine to tests passed: launch/test.sh [--slow] [pytest arguments].
set -euo pipefail
# shellcheck source=SCRIPTDIR/env.sh
. "$(dirname "$0")/env.sh"
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
