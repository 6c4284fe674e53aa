"""Where the autoencoder's training starts, and what `--check` says of a start before there is one."""

import shutil

import jax
import numpy as np
import pytest
import raw_sets
import tiny

from dreamlite_jax import model_folder, train
from dreamlite_jax.config import to_dict
from dreamlite_jax.errors import UserError
from dreamlite_jax.training.build import build
from dreamlite_jax.training.config import load_config


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Pictures, an autoencoder file, and a model folder with another autoencoder."""
    folder = tmp_path_factory.mktemp("init_from")
    raw_sets.write_folder(folder / "raw", 24)
    tiny.write_vae(folder / "vae.safetensors")
    params = {"unet": tiny.unet_params(), "vae": tiny.vae_params(seed=3)}
    model_folder.save_model(folder / "model", tiny.CONFIG, params, {"made": "at random"})
    mapping = {
        "stage": "vae",
        "model": to_dict(tiny.CONFIG),
        "data": {
            "sources": [{"path": str(folder / "raw"), "kind": "folder"}],
            "batch_size": 8,
            "buckets": {"size": 16, "multiple": 16},
        },
        "optim": {"learning_rate": 1e-7, "warmup_steps": 0},
        "init_from": str(folder / "vae.safetensors"),
        "steps": 2,
        "grid_items": 2,
    }
    tiny.write_config(folder / "config.py", mapping)
    return folder


def started(root, location):
    return jax.device_get(build(load_config(f"{root}/config.py", [f"init_from={location}"])).stage.init_state().params)


def same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_the_autoencoder_starts_from_a_file_a_model_or_a_run(root, tmp_path):
    first, other = tiny.vae_params(), tiny.vae_params(seed=3)
    assert same(started(root, root / "vae.safetensors"), first) and same(started(root, root / "model"), other)
    workdir = tmp_path / "work"
    assert train.main(["--config", f"{root}/config.py", "--workdir", str(workdir)]) == 0
    _, trained = model_folder.load_vae(workdir / "model" / "vae.safetensors")
    changes = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (trained, first)), strict=True)]
    assert 0 < max(changes) < 1e-5  # of two steps at 1e-7; from random weights it would be about 1
    assert same(started(root, workdir), trained)
    shutil.rmtree(workdir / "model")
    assert same(started(root, workdir), trained)  # the average of its newest checkpoint


@pytest.mark.parametrize("flags", [["--check"], []])
def test_a_start_that_cannot_be_is_refused_before_a_run(root, tmp_path, flags):
    def refused(says, *overrides):
        overrides = [f"--config.{override}" for override in overrides]
        with pytest.raises(UserError, match=says):
            train.main(["--config", f"{root}/config.py", "--workdir", str(tmp_path / "work"), *flags, *overrides])

    refused(r"config.init_from .*nowhere does not exist", f"init_from={tmp_path}/nowhere")
    refused(r"config.init_from .*raw is neither an autoencoder file, nor a model folder", f"init_from={root}/raw")
    wider = ["model.vae.width=8"]
    refused(r"autoencoder of another architecture: config.model.vae.width is 8, and 4 there$", *wider)
    refused(r"config.model.vae.width is 8, and 4 there$", f"init_from={root}/model", *wider)
    refused(r"config.dtype is 'bfloat16', but stage vae does not read it", "dtype=bfloat16")


def test_check_looks_at_the_start_of_the_unet_too(run_config, tmp_path, capsys):
    arguments = ["--config", run_config, "--workdir", str(tmp_path / "work"), "--check"]
    with pytest.raises(UserError, match=r"nowhere does not exist"):
        train.main([*arguments, f"--config.init_from={tmp_path}/nowhere"])
    with pytest.raises(
        UserError, match=r"holds a U-Net of another architecture: config.model.unet.ff_mult is 2, and 3"
    ):
        train.main([*arguments, "--config.model.unet.ff_mult=2"])
    with pytest.raises(UserError, match=r"config.dmd.teacher .*nowhere|nowhere does not exist"):
        unguided = ["model.guidance_scale=1", "model.image_guidance_scale=1", "optim.warmup_steps=1"]
        flags = [f"--config.{name}" for name in (*unguided, "stage=dmd2", f"dmd={{'teacher': '{tmp_path}/nowhere'}}")]
        train.main([*arguments, *flags])
    assert train.main([*arguments, "--config.optim.warmup_steps=50"]) == 0
    assert "config.optim.warmup_steps is 50, and the run has 12 steps" in capsys.readouterr().out


def test_check_says_what_a_run_would_go_on_with_or_be_refused_for(whole, run_config, tmp_path, capsys):
    def checked(workdir, *overrides):
        overrides = [f"--config.{override}" for override in overrides]
        assert train.main(["--config", run_config, "--workdir", str(workdir), "--check", *overrides]) == 0
        return capsys.readouterr().out

    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert "workdir: complete after 12 steps" in checked(whole)
    said = checked(whole, "steps=20", "data.batch_size=16")
    assert "workdir: goes on from step 12; " in said and "config.data.batch_size is 16, was 8" in said
    with pytest.raises(UserError, match=r"config.data.sources\[0\].weight is 5, was 1"):
        checked(whole, "steps=20", "data.sources.0.weight=5")
    with pytest.raises(UserError, match=r"has trained 12 steps"):
        checked(whole, "steps=3")
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before
