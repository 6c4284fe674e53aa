# Sourced by the launch scripts: where the environment is, and what makes JAX quick on a CPU.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${DREAMLITE_VENV:-$ROOT/.venv}
export PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=${TF_CPP_MIN_LOG_LEVEL:-2}

# Huge pages for large buffers: without them half of a training step on CPU goes into page faults.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

# One JAX device a core: XLA runs much of a backward pass on one thread, so splitting the batch nearly doubles the pace.
if [ -z "${XLA_FLAGS:-}" ] && [ "${JAX_PLATFORMS:-cpu}" = cpu ]; then
  cores=$(nproc)
  devices=1
  for n in 2 4 8; do [ "$cores" -ge "$n" ] && devices=$n; done
  export XLA_FLAGS="--xla_force_host_platform_device_count=$devices"
fi
