"""Training on text states of one kind with a network of the other: latents, a first model, a checkpoint; and what
folders of versions without `text.state` mean."""

import dataclasses
import json

import pytest
import tiny

from dreamlite_jax import model_folder
from dreamlite_jax.config import TextConfig, from_dict, to_dict
from dreamlite_jax.errors import UserError
from dreamlite_jax.training import checkpoint, start
from dreamlite_jax.training.config import TrainConfig
from dreamlite_jax.training.feed import LatentFeed

QWEN = TextConfig("qwen3_vl", ".", max_length=300)
AFTER = dataclasses.replace(QWEN, state="after_norm")
OLDER = {name: value for name, value in to_dict(QWEN).items() if name != "state"}  # as it was stored before
MINILM = {name: value for name, value in to_dict(TextConfig()).items() if name != "state"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.write_inputs(tmp_path_factory.mktemp("inputs"))


def config_of(root, text: TextConfig) -> TrainConfig:
    mapping = tiny.train_config(root)
    return from_dict(TrainConfig, {**mapping, "model": {**mapping["model"], "text": to_dict(text)}}, "config")


@pytest.mark.parametrize("folder", ["t2i", "edit"])
def test_latents_of_the_other_state_are_refused_by_name(root, folder):
    path = root / folder / "info.json"
    kept = path.read_text()
    try:
        for stored, fits in ((to_dict(QWEN), QWEN), (to_dict(AFTER), AFTER), (OLDER, AFTER)):
            path.write_text(json.dumps({**json.loads(kept), "config": {"text": stored}}))
            LatentFeed(config_of(root, fits))
            other = AFTER if fits is QWEN else QWEN
            with pytest.raises(UserError, match=rf"{folder} holds text states of qwen3_vl {fits.state}, but config\."):
                LatentFeed(config_of(root, other))
    finally:
        path.write_text(kept)


def stored_model(folder, text, provenance) -> None:
    """The manifest of a model folder, whose weights are not looked at."""
    folder.mkdir()
    config = {**to_dict(tiny.CONFIG), "text": text}
    (folder / "model.json").write_text(
        json.dumps({"format_version": model_folder.FORMAT_VERSION, "config": config, "provenance": provenance})
    )
    for name in ("unet", "vae"):
        (folder / f"{name}.safetensors").touch()


@pytest.mark.parametrize(
    "text, command, state",
    [
        (OLDER, "conversion.from_torch", "before_norm"),  # released weights, whatever the version that carried them
        (OLDER, "dreamlite_jax.train", "after_norm"),
        (OLDER, None, "after_norm"),
        (MINILM, "dreamlite_jax.train", None),
        (to_dict(AFTER), "conversion.from_torch", "after_norm"),
        (to_dict(QWEN), "dreamlite_jax.train", "before_norm"),
    ],
)
def test_what_a_model_folder_means(tmp_path, text, command, state):
    stored_model(tmp_path / "model", text, {"command": command} if command else {})
    assert model_folder.load_config(tmp_path / "model").text.state == state


def test_a_first_model_of_the_other_state_is_refused(root, tmp_path):
    stored_model(tmp_path / "model", OLDER, {})
    stored = start.Stored(config_of(root, QWEN), None, str(tmp_path / "model"), "init_from")
    with pytest.raises(UserError, match=r"config\.init_from .*trained on text states of qwen3_vl after_norm"):
        stored.load()


def test_a_checkpoint_of_the_other_state_is_refused(root, tmp_path):
    now, older = (json.loads(json.dumps(to_dict(config_of(root, text)))) for text in (QWEN, AFTER))
    minilm = json.loads(json.dumps(to_dict(config_of(root, TextConfig()))))
    with pytest.raises(UserError, match=r"checkpoint of another architecture: .*model\.text\.state"):
        checkpoint._compare(tmp_path, 1, older, now)
    for config in (older, minilm):  # what a version without the field stored
        stored = json.loads(json.dumps(config))
        del stored["model"]["text"]["state"]
        checkpoint._compare(tmp_path, 1, stored, config)
    del older["model"]["text"]["state"]
    with pytest.raises(UserError, match=r"another architecture: .*model\.text\.state"):
        checkpoint._compare(tmp_path, 1, older, now)
