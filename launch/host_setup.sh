#!/usr/bin/env bash
# Runs on every host of a TPU VM pod: launch/host_setup.sh BUCKET. Mounts the bucket on /gcs and installs the project with
# TPU support. Run again it does what is left.
set -euo pipefail
bucket=$1
cd "$(dirname "$0")/.."
# shellcheck source=SCRIPTDIR/env.sh
. launch/env.sh

apt() { sudo DEBIAN_FRONTEND=noninteractive apt-get -q "$@" >/dev/null; }

# The images of v5e and v6e (Ubuntu 22.04) come with Python 3.10.
if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  apt update && apt install -y python3.11 python3.11-venv
  export PYTHON=python3.11
fi

if ! command -v gcsfuse >/dev/null; then
  key=/usr/share/keyrings/cloud.google.asc
  curl -fsS https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] https://packages.cloud.google.com/apt gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  apt update && apt install -y gcsfuse
fi
if ! mountpoint -q /gcs; then
  sudo mkdir -p /gcs && sudo chown "$(id -u):$(id -g)" /gcs
  # A checkpoint gets its final name by renaming a folder: atomic in a bucket with a hierarchical namespace. In another
  # gcsfuse copies file by file, and refuses above the limit.
  gcsfuse --implicit-dirs --rename-dir-limit=100000 "$bucket" /gcs
fi

launch/setup.sh tpu
