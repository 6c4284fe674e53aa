#!/usr/bin/env bash
# One command from a fresh clone to a small DreamLite trained, sampled, edited and converted: launch/quickstart.sh [WORKDIR].
# Finished steps are skipped and an interrupted one goes on, so the same command always does what is left.
set -euo pipefail
# shellcheck source=SCRIPTDIR/env.sh
. "$(dirname "$0")/env.sh"
work=${1:-runs/quickstart}
mkdir -p "$work" && work=$(cd "$work" && pwd)
cd "$ROOT"

started=$SECONDS
"$ROOT/launch/setup.sh" demo,convert
python="$VENV/bin/python"
export JAX_COMPILATION_CACHE_DIR="$work/cache" # an interrupted stage does not compile again
mkdir -p "$work/steps"
[ -f "$work/steps/install" ] || echo "$((SECONDS - started))" >"$work/steps/install"

# step NAME COMMAND…: runs it unless it is done; adds up its seconds, interrupted attempts included where they end tidily.
step() {
  local name=$1 begin=$SECONDS
  shift
  [ -f "$work/steps/$name" ] && return 0
  echo "== $name" >&2
  "$@"
  echo "$((SECONDS - begin))" >"$work/steps/$name"
}

train() {
  "$python" -m dreamlite_jax.train --config "configs/quickstart.py:$1,$work" --workdir "$work/$1"
}

latents() { # NAME SPLIT OUTPUT
  "$python" -m dreamlite_jax.precompute --config "configs/precompute.py:$1" --config.source.path="$work/data" \
    --config.source.split="$2" --output "$work/latents/$3"
}

evaluate() { # STAGE TASKS SPLITS
  # shellcheck disable=SC2086 # tasks and splits are lists of words
  "$python" -m dreamlite_jax.evaluate --model "$work/$1" --benchmark sprites --task $2 --split $3 --output "$work/evals/$1"
}

sample() { "$python" -m dreamlite_jax.sample --model "$work/joint" "$@"; }
runtime() { "$python" -m conversion.runtime --model "$work/litert" "$@"; }

step data "$python" -m dreamlite_jax.data.sprites --data_dir "$work/data" --size 64 --validation 64 --heldout 64
step latents_t2i latents t2i_64 train t2i
step latents_edit latents edit_64 train edit
step latents_t2i_validation latents t2i_64 validation t2i_validation
step latents_edit_validation latents edit_64 validation edit_validation
step t2i train t2i
step edit train edit
step joint train joint
step eval_t2i evaluate t2i generate validation
step eval_edit evaluate edit edit validation
step eval_joint evaluate joint "generate edit" "validation heldout"
mkdir -p "$work/pictures"
step sample sample --prompt "a red car and a yellow star on a blue background" --seed 7 --output "$work/pictures/made.png"
step sample_edit sample --prompt "make the car green" --image "$work/pictures/made.png" --seed 7 --output "$work/pictures/edited.png"
step litert "$python" -m conversion.to_litert --model "$work/joint/model" --output "$work/litert" --component all
step runtime runtime --prompt "a red car and a yellow star on a blue background" --seed 7 --output "$work/pictures/made_litert.png"
step runtime_edit runtime --prompt "make the car green" --image "$work/pictures/made.png" --seed 7 --output "$work/pictures/edited_litert.png"
"$python" -m dreamlite_jax.evals.quickstart --workdir "$work"
