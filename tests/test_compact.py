"""Weights of one byte: rounded as promised, read by everything that reads a model, and refused when damaged."""

import dataclasses
import json

import numpy as np
import pytest
from test_model_folder import CONFIG, PARAMS, PROVENANCE, rewrite

from dreamlite_jax import compact, int8, model_folder
from dreamlite_jax.errors import UserError
from dreamlite_jax.tensor_files import stored_tensors

KERNEL = "down_blocks_0/attentions_0/transformer_blocks_0/attn2/to_q/kernel"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model folder and the same one made compact."""
    root = tmp_path_factory.mktemp("compact")
    whole = model_folder.save_model(root / "whole", CONFIG, PARAMS, PROVENANCE)
    assert compact.main(["--model", str(whole), "--output", str(root / "small")]) == 0
    return whole, root / "small"


def test_it_says_the_same_of_itself_and_that_it_is_compact(folders):
    whole, small = (json.loads((folder / "model.json").read_text()) for folder in folders)
    assert "int8" in small["provenance"].pop("compact")
    assert small == whole


@pytest.mark.parametrize("component", model_folder.COMPONENTS)
def test_weights_move_by_half_a_step_of_their_channel_at_most(folders, component):
    whole, small = (model_folder.flatten(model_folder.load_params(folder, component)) for folder in folders)
    for name, before in whole.items():
        moved = np.abs(small[name] - before)
        if before.ndim < 2:
            assert not moved.any(), name
            continue
        axes = tuple(range(before.ndim - 1))
        step = np.abs(before).max(axes) / int8.LARGEST
        assert small[name].dtype == np.float32 and (moved.max(axes) <= 0.5001 * step).all(), name
        assert moved.any(), name  # or nothing was packed


def test_files_shrink_to_a_quarter(folders):
    """More than a quarter here: the reduced network has many scales for few weights."""
    for component in model_folder.COMPONENTS:
        before, after = ((folder / model_folder.weight_file(component)).stat().st_size for folder in folders)
        assert after < 0.45 * before
    assert stored_tensors(folders[1] / "unet.safetensors")[KERNEL].dtype == "I8"


def test_a_channel_of_zeros_stays_zero():
    kernel = np.array([[0.0, 2.0], [0.0, -1.0]], np.float32)
    packed = int8.pack({"kernel": kernel})
    assert (packed["kernel"] * packed["kernel:scale"])[:, 0].tolist() == [0.0, 0.0]
    assert packed["kernel"][:, 1].tolist() == [127, -64]


DAMAGE = {
    "no scale": (lambda t: t.pop(f"{KERNEL}:scale"), [KERNEL, "stored as I8"]),
    "a scale alone": (lambda t: t.update({KERNEL: t[KERNEL].astype(np.float32)}), [f"{KERNEL}:scale is not a tensor"]),
    "misshapen scale": (lambda t: t.update({f"{KERNEL}:scale": t[f"{KERNEL}:scale"][1:]}), [KERNEL, "stored as I8"]),
    "misshapen kernel": (lambda t: t.update({KERNEL: t[KERNEL][1:]}), [KERNEL, "(31, 32)", "(32, 32)"]),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(tmp_path, damage):
    folder = model_folder.save_model(tmp_path / "model", CONFIG, PARAMS, {}, dtype=np.int8)
    change, said = DAMAGE[damage]
    rewrite(folder / "unet.safetensors", change)
    with pytest.raises(UserError) as raised:
        model_folder.load_params(folder, "unet")
    assert all(part in str(raised.value) for part in said)


def test_the_output_must_be_free_or_given_up(folders):
    command = ["--model", str(folders[0]), "--output", str(folders[1])]
    with pytest.raises(UserError, match="is not empty"):
        compact.main(command)
    assert compact.main([*command, "--replace"]) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_weights_that_are_no_numbers_are_refused(bad):
    with pytest.raises(UserError, match="layer/kernel has weights that are no finite numbers"):
        int8.pack({"layer/kernel": np.array([[bad, 0.3]], np.float32)})


def test_a_model_with_a_large_text_encoder_is_refused(tmp_path):
    config = dataclasses.replace(CONFIG, text=dataclasses.replace(CONFIG.text, encoder="qwen3_vl", source="."))
    folder = model_folder.save_model(tmp_path / "model", config, PARAMS, {})
    with pytest.raises(UserError, match="has the text encoder qwen3_vl"):
        compact.main(["--model", str(folder), "--output", str(tmp_path / "small")])
    assert not (tmp_path / "small").exists()
