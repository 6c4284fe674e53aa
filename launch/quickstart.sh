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
# shellcheck source=SCRIPTDIR/steps.sh
. "$ROOT/launch/steps.sh"
begin demo,convert

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
  # Combinations that no stage has seen, three pictures of each item, so that the spread between seeds is seen.
  three() { step "eval_heldout_$1" evaluate "$1" "$2" "generate edit" heldout --draws 3 "${@:3}"; }
  three sft sft
  three refl refl
  three dmd2 dmd2
  # What the student is held against: its teacher as it is meant to be sampled, and sampled like the student.
  three teacher refl --steps 28
  three undistilled refl --steps 4 --guidance_scale 1 --image_guidance_scale 1
  draw dmd2 "$work/student" _student
fi
"$python" -m dreamlite_jax.evals.quickstart --workdir "$work"
