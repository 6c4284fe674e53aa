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
exec "$VENV/bin/python" -m pytest "$@"
