# shellcheck shell=bash
# Sourced by the launch scripts: where the environment is, and what makes JAX quick on a CPU.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export VENV=${DREAMLITE_VENV:-$ROOT/.venv}
export PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}

# Huge pages for large buffers: without them half of a training step on CPU goes into page faults.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

# find_python 3.13: a command that runs this Python; nothing, and a code of 1, where there is none.
find_python() {
  local python
  for python in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/"python$1"; do
    if "$python" -c '' 2>/dev/null; then echo "$python" && return; fi # pyenv has a python3.13 that runs nothing
  done
  return 1
}
