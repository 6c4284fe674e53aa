"""It learns, at a reduced size: the quick start's joint stage on few sprites for about a minute, against no training.

The same commands as the quick start, the same network narrowed, the shipped autoencoder. Losses and scores are those
of validation scenes, which are never trained on; seeds are fixed. The thresholds stand about half way between the two.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from dreamlite_jax.data import latents
from dreamlite_jax.data.sprites import __main__ as sprites
from dreamlite_jax.model_folder import load_params
from dreamlite_jax.training.build import build
from dreamlite_jax.training.config import load_config

REPOSITORY = Path(__file__).parents[2]
RECORDS = {"train": 1500, "validation": 64}
OVERRIDES = {
    "init_from": "''",
    "steps": 700,
    "log_every": 50,
    "checkpoint_every": 700,
    "grid_every": 700,
    "grid_items": 2,
    "grid_steps": 4,
    "data.batch_size": 32,
    "optim.learning_rate": 3e-3,
    "optim.warmup_steps": 20,
    "optim.ema_decay": 0.98,
    "model.unet.block_out_channels": (32, 48, 64),
    "model.unet.num_heads": (2, 3, 4),
    "model.unet.norm_groups": 8,
    "model.unet.cross_attention_dim": 64,
    "model.guidance_scale": 2.0,
    "model.image_guidance_scale": 1.5,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The quick start's folder, with few records."""
    folder = tmp_path_factory.mktemp("learning")
    counts = [f"--{split}={count}" for split, count in RECORDS.items()]
    assert sprites.main(["--data_dir", str(folder / "data"), *counts, "--heldout=8"]) == 0
    for task in ("t2i", "edit"):
        for split, name in (("train", task), ("validation", f"{task}_validation")):
            config = f"{REPOSITORY}/configs/precompute.py:{task}_64"
            source = (f"--config.source.path={folder}/data", f"--config.source.split={split}")
            command(folder, "precompute", "--config", config, *source, "--output", f"{folder}/latents/{name}")
    return folder


def command(root: Path, name: str, *arguments: str) -> None:
    """Runs a command as a user does, on one device; what was compiled for one run serves the next."""
    env = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(root / "cache"), "XLA_FLAGS": ""}
    line = [sys.executable, "-m", f"dreamlite_jax.{name}", *arguments]
    done = subprocess.run(line, env=env, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def config(root):
    """(location, overrides) of the reduced joint stage."""
    return f"{REPOSITORY}/configs/quickstart.py:joint,{root}", [f"{name}={value}" for name, value in OVERRIDES.items()]


@pytest.fixture(scope="module")
def run(config):
    return build(load_config(*config))


@pytest.fixture(scope="module")
def models(root, config, run):
    """Model folders: trained, and as it was before the first step."""
    location, overrides = config
    overrides = [f"--config.{override}" for override in overrides]
    command(root, "train", "--config", location, "--workdir", str(root / "joint"), *overrides)
    untrained = jax.device_get(run.stage.init_state().params)
    run.gallery.export(untrained, root / "untrained", {"made": "at random"})
    return {"trained": root / "joint" / "model", "untrained": root / "untrained"}


@pytest.fixture(scope="module")
def scores(root, models):
    found = {}
    for name, folder in models.items():
        output = root / "scores" / name
        options = ("--benchmark", "sprites", "--items", "96", "--steps", "8")
        command(root, "evaluate", "--model", str(folder), *options, "--output", str(output))
        found[name] = json.loads((output / "report.json").read_text())["validation"]
    print(json.dumps(found, indent=1))
    return found


def test_velocity_loss_falls_on_scenes_never_trained_on(root, run, models):
    stage = run.stage
    loss = jax.jit(stage.loss)
    for task in ("t2i", "edit"):
        records = latents.open_examples(root / "latents" / f"{task}_validation")
        examples = [latents.unpack(records[i]) for i in range(len(records))]
        items = [latents.collate(example, stage.config.data.text_length) for example in examples]
        batch = jax.tree.map(lambda *x: np.stack(x), *items)
        mse = {
            name: float(loss(load_params(m, "unet"), batch, jax.random.key(0))[1]["mse"]) for name, m in models.items()
        }
        print(task, mse)
        assert mse["trained"] < 0.75 * mse["untrained"]


def test_pictures_show_what_was_asked(scores):
    trained, untrained = (scores[name]["generate"] for name in ("trained", "untrained"))
    assert trained["retrieval_random"] > untrained["retrieval_random"] + 0.15
    assert trained["mse"] < 0.8 * untrained["mse"]


def test_edits_change_what_was_asked(scores):
    trained, untrained = (scores[name]["edit"] for name in ("trained", "untrained"))
    assert trained["edit_gain"] > untrained["edit_gain"] + 0.05
    assert trained["unchanged_psnr"] > untrained["unchanged_psnr"] + 1.0


def test_the_run_reports_what_it_did(root, models):
    rows = [json.loads(line) for line in (root / "joint" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, OVERRIDES["steps"] + 1))
    first, last = (np.mean([row["loss"] for row in part]) for part in (rows[:20], rows[-50:]))
    assert last < 0.75 * first
    assert load_config(f"{REPOSITORY}/configs/quickstart.py:joint,{root}").model.unet.text_dim == tiny.TEXT_DIM
