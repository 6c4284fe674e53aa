#!/usr/bin/env bash
# One command from a fresh clone to a small DreamLite trained, sampled, edited and converted:
#   launch/quickstart.sh [--full] [WORKDIR]
# --full goes on after the joint stage: SFT, ReFL, and a student of four steps, which is what is then sampled and converted.
# Finished steps are skipped and an interrupted one goes on, so the same command always does what is left.
set -euo pipefail
# shellcheck source=SCRIPTDIR/env.sh
. "$(dirname "$0")/env.sh"
full=
[ "${1:-}" = --full ] && full=1 && shift
work=${1:-runs/quickstart}
for word in "$work" "${@:2}"; do
  case $word in -*) echo "error: $word is no option here; usage: launch/quickstart.sh [--full] [WORKDIR]" >&2 && exit 2 ;; esac
done
[ $# -gt 1 ] && echo "error: $2 is one too many; usage: launch/quickstart.sh [--full] [WORKDIR]" >&2 && exit 2
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
  echo "$((SECONDS - begin))" >"$work/steps/.$name" && mv "$work/steps/.$name" "$work/steps/$name" # whole, or not there
}

train() { # CONFIG STAGE
  "$python" -m dreamlite_jax.train --config "configs/$1.py:$2,$work" --workdir "$work/$2"
}

latents() { # NAME SPLIT OUTPUT
  "$python" -m dreamlite_jax.precompute --config "configs/precompute.py:$1" --config.source.path="$work/data" \
    --config.source.split="$2" --output "$work/latents/$3"
}

evaluate() { # NAME STAGE TASKS SPLITS [SETTINGS…]
  local name=$1 stage=$2 tasks=$3 splits=$4
  shift 4
  rm -rf "$work/evals/$name" # of a try that was stopped before its step was marked as done
  # shellcheck disable=SC2086 # tasks and splits are lists of words
  "$python" -m dreamlite_jax.evaluate --model "$work/$stage" --benchmark sprites --task $tasks --split $splits \
    --output "$work/evals/$name" "$@"
}

# draw STAGE FOLDER SUFFIX: samples, edits, converts, and draws both again without JAX.
draw() {
  local stage=$1 to=$2 suffix=$3
  local sample=("$python" -m dreamlite_jax.sample --model "$work/$stage" --seed 7)
  local runtime=("$python" -m conversion.runtime --model "$to/litert" --seed 7)
  local made=(--prompt "a red car and a yellow star on a blue background")
  local edited=(--prompt "make the car green" --image "$to/pictures/made.png")
  mkdir -p "$to/pictures"
  step "sample$suffix" "${sample[@]}" "${made[@]}" --output "$to/pictures/made.png"
  step "sample_edit$suffix" "${sample[@]}" "${edited[@]}" --output "$to/pictures/edited.png"
  # A try that missed a floor has left its folder for inspection.
  step "litert$suffix" "$python" -m conversion.to_litert --model "$work/$stage/model" --output "$to/litert" --component all --replace
  step "runtime$suffix" "${runtime[@]}" "${made[@]}" --output "$to/pictures/made_litert.png"
  step "runtime_edit$suffix" "${runtime[@]}" "${edited[@]}" --output "$to/pictures/edited_litert.png"
}

step data "$python" -m dreamlite_jax.data.sprites --data_dir "$work/data" --size 64 --validation 64 --heldout 64
step latents_t2i latents t2i_64 train t2i
step latents_edit latents edit_64 train edit
step latents_t2i_validation latents t2i_64 validation t2i_validation
step latents_edit_validation latents edit_64 validation edit_validation
step t2i train quickstart t2i
step edit train quickstart edit
step joint train quickstart joint
step eval_t2i evaluate t2i t2i generate validation
step eval_edit evaluate edit edit edit validation
step eval_joint evaluate joint joint "generate edit" "validation heldout"
if [ -z "$full" ]; then
  draw joint "$work" ""
else
  step sft train quickstart_post sft
  step refl train quickstart_post refl
  step dmd2 train quickstart_post dmd2
  step eval_sft evaluate sft sft "generate edit" validation
  step eval_refl evaluate refl refl "generate edit" "validation heldout"
  step eval_dmd2 evaluate dmd2 dmd2 "generate edit" "validation heldout"
  # What the student is held against: its teacher as it is meant to be sampled, and sampled like the student.
  step eval_teacher evaluate teacher refl "generate edit" validation --steps 28
  step eval_undistilled evaluate undistilled refl "generate edit" validation --steps 4 --guidance_scale 1 --image_guidance_scale 1
  draw dmd2 "$work/student" _student
fi
"$python" -m dreamlite_jax.evals.quickstart --workdir "$work"
