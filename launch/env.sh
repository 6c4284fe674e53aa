# shellcheck shell=bash
# Sourced by the launch scripts: where the environment is, and what makes JAX quick on a CPU.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export VENV=${DREAMLITE_VENV:-$ROOT/.venv}
export PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}

# Huge pages for large buffers: without them half of a training step on CPU goes into page faults.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}
