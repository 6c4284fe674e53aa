"""The full-size recipe from a released folder to a picture, on a small released pipeline with its real tokenizer."""

import jax
import numpy as np
import pytest
import raw_sets
import released_folder
from PIL import Image

from conversion import from_torch
from dreamlite_jax import model, precompute, train
from dreamlite_jax.config import to_dict
from dreamlite_jax.data import latents
from dreamlite_jax.text.encoder import PromptRequest
from dreamlite_jax.text.load import load_encoder
from dreamlite_jax.training.build import build
from dreamlite_jax.training.config import load_config

PX = 64
CONFIG = """
import importlib.util
import sys

sys.path.insert(0, "configs")
import dreamlite

def get_config():
    c = dreamlite.get_config("joint,{root}")
    c.model.unet, c.model.vae = {unet!r}, {vae!r}
    c.model.update({sampling!r})
    c.data.validation, c.data.batch_size, c.data.threads, c.data.buckets = (), 8, 2, {{"size": {px}, "multiple": {px}}}
    c.mesh.fsdp, c.accumulate, c.init_from, c.steps, c.log_every, c.grid_every = 1, 1, "", 2, 1, 2
    c.checkpoint_every, c.dtype, c.remat, c.flow.text_drop = 2, "float32", False, 0.5
    return c
"""


def picture(seed: int) -> Image.Image:
    return released_folder.picture(PX, PX, seed=seed)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """ROOT of the recipe: the released folder converted, raw records of both tasks, and their latents."""
    folder = tmp_path_factory.mktemp("recipe")
    theirs = released_folder.write(folder / "theirs", released_folder.components(), "DreamLitePipeline")
    from_torch.convert(str(theirs), folder / "released")
    files = [raw_sets.encoded(picture(i)) for i in range(8)]
    rows = {
        "t2i": [{"image": file, "caption": f"number {i}"} for i, file in enumerate(files)],
        "edit": [
            {"source": file, "instruction": f"make it number {i}", "target": files[i - 1]}
            for i, file in enumerate(files)
        ],
    }
    sizes = [f"--config.buckets.{name}={value}" for name, value in (("size", PX), ("multiple", PX), ("max_ratio", 1.0))]
    for task, records in rows.items():
        raw_sets.write_shards(folder / "raw" / task, records)
        location = f"configs/dreamlite_latents.py:{task}_256,{folder}"
        output = str(folder / "latents" / f"{task}_1024")
        more = ["--config.source.name=set", "--config.batch_size=8"]
        assert precompute.main(["--config", location, "--output", output, *sizes, *more]) == 0
    return folder


@pytest.fixture(scope="module")
def config(root):
    unet, vae = to_dict(released_folder.UNET), to_dict(released_folder.VAE)
    sampling = {"native_size": PX, "steps": 2, "edit_size": "source"}
    text = CONFIG.format(root=root, unet=unet, vae=vae, sampling=sampling, px=PX)
    path = root / "config.py"
    path.write_text(text)
    return str(path)


def test_a_dropped_prompt_of_an_edit_is_the_one_that_guidance_asks_for(root, config):
    """Beside the source, as the sampler has it; the control is the empty prompt of generation."""
    stage, feed, _ = build(load_config(config))
    batch = next(iter(feed.dataset(stage.fields)))
    null = jax.device_get(stage.denoiser.null_text(batch))
    encoder = load_encoder(stage.config.model.text)
    records = [latents.unpack(record) for record in latents.open_examples(root / "latents" / "edit_1024")]
    editing = np.flatnonzero(batch["editing"])
    assert 0 < len(editing) < 8
    for row in range(8):
        if row in editing:
            nearest = min(records, key=lambda record: np.square(batch["target"][row] - record.target).sum())
            source = picture(int(nearest.text.split()[-1]))
            wanted = encoder.encode([PromptRequest("null", "", source)], stage.config.data.text_length)
        else:
            wanted = encoder.encode([PromptRequest("null", "")], stage.config.data.text_length)
        np.testing.assert_array_equal(null.mask[row], wanted.mask[0])
        scale = np.abs(wanted.states).max()
        assert np.abs(null.states[row] - wanted.states[0]).max() <= 2e-2 * scale  # bfloat16, stored as float16
    blind = encoder.encode([PromptRequest("null", "")], stage.config.data.text_length)
    assert np.abs(null.states[editing[0]] - blind.states[0]).max() > 0.5 * scale


@pytest.mark.slow
def test_it_trains_and_the_model_draws_and_edits(root, config, tmp_path):
    assert train.main(["--config", config, "--workdir", str(tmp_path / "run")]) == 0
    trained = model.load_model(tmp_path / "run")
    drawn = trained.generate(["a fish"], steps=2, width=PX, height=PX, seeds=[1])
    edited = trained.generate(["make it blue"], images=[picture(3)], steps=2, seeds=[1])
    assert drawn.shape == edited.shape == (1, PX, PX, 3) and np.isfinite(drawn).all() and np.isfinite(edited).all()
