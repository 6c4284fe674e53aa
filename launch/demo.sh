#!/usr/bin/env bash
# Makes the model that travels with the package (dreamlite_jax/assets/demo), from nothing:
#   launch/demo.sh [WORKDIR]
# It ends as WORKDIR/demo, which is what to copy there, with its scores in WORKDIR/evals/demo. As with launch/quickstart.sh
# the same command goes on.
set -euo pipefail
# shellcheck source=SCRIPTDIR/env.sh
. "$(dirname "$0")/env.sh"
work=${1:-runs/demo}
case $work in -*) echo "error: $work is no option here; usage: launch/demo.sh [WORKDIR]" >&2 && exit 2 ;; esac
[ $# -gt 1 ] && echo "error: $2 is one too many; usage: launch/demo.sh [WORKDIR]" >&2 && exit 2
# shellcheck source=SCRIPTDIR/steps.sh
. "$ROOT/launch/steps.sh"
begin demo

step data "$python" -m dreamlite_jax.data.sprites --data_dir "$work/data" --size 64 --train 48000 --validation 64 --heldout 64
XLA_FLAGS=--xla_force_host_platform_device_count=2 step vae train demo vae # see configs/vae.py
vae="$work/vae/model/vae.safetensors"
step latents_t2i latents t2i_64 train t2i --config.vae="$vae"
step latents_edit latents edit_64 train edit --config.vae="$vae"
step latents_t2i_validation latents t2i_64 validation t2i_validation --config.vae="$vae"
step latents_edit_validation latents edit_64 validation edit_validation --config.vae="$vae"
for stage in t2i edit joint sft refl dmd2; do
  step $stage train demo $stage
done
step compact "$python" -m dreamlite_jax.compact --model "$work/dmd2" --output "$work/demo" --replace
step eval_demo evaluate demo demo "generate edit" "validation heldout" --draws 3
echo "model: $work/demo; scores: $work/evals/demo/report.json"
