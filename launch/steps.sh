# shellcheck shell=bash
# Sourced after env.sh by scripts of many steps, which name their folder in `work`.

begin() { # EXTRAS: makes the folder and, where it is not there yet, the environment
  local started=$SECONDS
  mkdir -p "$work" && work=$(cd "$work" && pwd)
  cd "$ROOT" || return
  work=${work#"$ROOT/"} # what models say of where they come from holds on other machines too
  "$ROOT/launch/setup.sh" "$1"
  python="$VENV/bin/python"
  export JAX_COMPILATION_CACHE_DIR="$work/cache" # an interrupted stage does not compile again
  mkdir -p "$work/steps"
  [ -f "$work/steps/install" ] || echo "$((SECONDS - started))" >"$work/steps/install"
}

# step NAME COMMAND…: runs it unless it is done, and writes down its seconds (a stage's own clock knows all attempts).
step() {
  local name=$1 started=$SECONDS
  shift
  [ -f "$work/steps/$name" ] && return 0
  echo "== $name" >&2
  "$@"
  echo "$((SECONDS - started))" >"$work/steps/.$name" && mv "$work/steps/.$name" "$work/steps/$name" # whole, or not there
}

train() { # CONFIG STAGE
  "$python" -m dreamlite_jax.train --config "configs/$1.py:$2,$work" --workdir "$work/$2"
}

latents() { # NAME SPLIT OUTPUT [SETTINGS…]
  local name=$1 split=$2 output=$3
  shift 3
  "$python" -m dreamlite_jax.precompute --config "configs/precompute.py:$name" --config.source.path="$work/data" \
    --config.source.split="$split" --output "$work/latents/$output" "$@"
}

evaluate() { # NAME STAGE TASKS SPLITS [SETTINGS…]
  local name=$1 stage=$2 tasks=$3 splits=$4
  shift 4
  rm -rf "$work/evals/$name" # of a try that was stopped before its step was marked as done
  # shellcheck disable=SC2086 # tasks and splits are lists of words
  "$python" -m dreamlite_jax.evaluate --model "$work/$stage" --benchmark sprites --task $tasks --split $splits \
    --output "$work/evals/$name" "$@"
}
