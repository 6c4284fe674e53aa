"""Qwen2-VL and Qwen2.5-VL, the backbones of judges, against transformers: vision, windows, old configs and names."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reward_oracle
import safetensors.numpy

from dreamlite_jax.errors import UserError
from dreamlite_jax.models.qwen_vl import load, rope
from dreamlite_jax.models.qwen_vl.config import from_transformers
from dreamlite_jax.models.qwen_vl.model import QwenVL, abstract_params
from dreamlite_jax.models.qwen_vl.vision import VisionTower, alike
from dreamlite_jax.rewards.backbones import BACKBONES
from dreamlite_jax.training.loop import count

TOLERANCE = 2e-5  # largest absolute difference of a token, of order 1
GRADIENT_TOLERANCE = 1e-4  # relative, in the 2-norm
GRID = (10, 14)  # 5 x 7 merged patches: windows of 2 x 2 reach over both edges


def filled(shapes, state):
    """Parameters of a tower from torch's state dict, all of it."""
    state = dict(state)

    def value(path, leaf):
        key = load.keys(path)
        layers = range(leaf.shape[0]) if "blocks" in key else (None,)
        values = [load.to_ours(key, state.pop(load.torch_name(key, layer)).numpy()) for layer in layers]
        return np.stack(values) if "blocks" in key else values[0]

    params = jax.tree_util.tree_map_with_path(value, shapes)
    assert not state, f"tensors without a place: {sorted(state)}"
    return params


@dataclasses.dataclass(frozen=True)
class Eyes:
    """A vision tower beside its oracle's tokens of two pictures, and their gradients for given weights."""

    tower: VisionTower
    params: dict
    patches: np.ndarray
    weights: np.ndarray
    tokens: np.ndarray
    gradient: np.ndarray

    def error(self, tower: VisionTower) -> float:
        tokens, taps = jax.jit(lambda x: tower.apply({"params": self.params}, x, GRID))(self.patches)
        assert taps.shape[0] == 0
        return float(np.abs(tokens - self.tokens).max())

    def changed(self, **fields) -> VisionTower:
        return self.tower.clone(config=dataclasses.replace(self.tower.config, **fields))


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def eyes(request):
    import torch

    oracle = reward_oracle.base_model(request.param)
    config = from_transformers(oracle.config.to_dict())
    tower = VisionTower(config.vision)
    rng = np.random.default_rng(0)
    patches = rng.standard_normal((2, GRID[0] * GRID[1], config.vision.patch_dim)).astype(np.float32)
    weights = rng.standard_normal((2, GRID[0] * GRID[1] // 4, 64)).astype(np.float32)
    leaf = torch.from_numpy(patches).requires_grad_(True)
    grid = torch.tensor([[1, *GRID]] * 2)
    tokens = oracle.model.visual(leaf.reshape(-1, patches.shape[-1]), grid_thw=grid).pooler_output.reshape(2, -1, 64)
    (tokens * torch.from_numpy(weights)).sum().backward()
    shapes = jax.eval_shape(lambda x: tower.init(jax.random.key(0), x, GRID), patches)["params"]
    params = filled(shapes, oracle.model.visual.state_dict())
    return Eyes(tower, params, patches, weights, tokens.detach().numpy(), leaf.grad.numpy())


def test_vision_equals_transformers(eyes):
    assert np.abs(eyes.tokens).max() > 0.1
    assert eyes.error(eyes.tower) <= TOLERANCE


@pytest.mark.slow
def test_gradients_equal_transformers(eyes):
    """Of patches; the judges' tests compare those of pictures by default."""

    def loss(patches):
        return (eyes.tower.clone(remat=True).apply({"params": eyes.params}, patches, GRID)[0] * eyes.weights).sum()

    gradient = jax.jit(jax.grad(loss))(jnp.asarray(eyes.patches))
    assert np.linalg.norm(gradient - eyes.gradient) <= GRADIENT_TOLERANCE * np.linalg.norm(eyes.gradient)


def test_wrong_towers_are_seen(eyes):
    wrong = {"theta": eyes.changed(rope_theta=1e3)}
    if eyes.tower.config.window_px:
        wrong["all blocks in windows"] = eyes.changed(full_blocks=())
        wrong["no windows"] = eyes.changed(full_blocks=(0, 1, 2, 3))
    errors = {name: eyes.error(tower) for name, tower in wrong.items()}
    assert min(errors.values()) > 20 * TOLERANCE, errors


# ------------------------------------------------------------------------------------------------------------- windows


@pytest.mark.parametrize("grid", [(32, 32), (10, 14), (2, 2), (22, 44)])
def test_windows_equal_transformers(grid):
    """The oracle's order, once empty slots are left out; windows of 4 x 4 merged patches."""
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl")
    index, bounds = modeling.get_vision_window_index(
        torch.tensor([[1, *grid]]), spatial_merge_size=2, window_size=112, patch_size=14
    )
    slots, kept = rope.window_slots(grid, 2, 4)
    np.testing.assert_array_equal(slots[kept], index.numpy())
    sizes = kept.reshape(-1, 16).sum(1)
    np.testing.assert_array_equal(4 * np.cumsum(sizes), np.unique(bounds.numpy())[1:])


def test_runs_of_blocks():
    assert [run[:2] for run in alike(BACKBONES["qwen2_5_vl_7b"].vision) if not run[2]] == [
        (7, 8), (15, 16), (23, 24), (31, 32)
    ]  # fmt: skip
    assert alike(BACKBONES["qwen2_vl_7b"].vision) == [(0, 32, False)]
    assert [run[1] for run in alike(BACKBONES["qwen3_vl_8b"].vision)] == [9, 17, 25, 27]


# ------------------------------------------------------------------------------------------- configs and names of old

# config.json as the hub has them, written by transformers before 4.52.
HUB = {
    "qwen2_vl_7b": {
        "model_type": "qwen2_vl", "image_token_id": 151655, "vision_start_token_id": 151652,
        "vision_end_token_id": 151653, "hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "vocab_size": 152064, "use_sliding_window": False, "sliding_window": 32768,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {
            "depth": 32, "embed_dim": 1280, "mlp_ratio": 4, "num_heads": 16, "in_chans": 3, "hidden_size": 3584,
            "patch_size": 14, "spatial_merge_size": 2, "spatial_patch_size": 14, "temporal_patch_size": 2,
        },
    },
    "qwen2_5_vl_7b": {
        "model_type": "qwen2_5_vl", "image_token_id": 151655, "vision_start_token_id": 151652,
        "vision_end_token_id": 151653, "hidden_act": "silu", "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "vocab_size": 152064, "use_sliding_window": False,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
        "vision_config": {
            "depth": 32, "hidden_act": "silu", "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
            "in_chans": 3, "out_hidden_size": 3584, "patch_size": 14, "spatial_merge_size": 2, "window_size": 112,
            "fullatt_block_indexes": [7, 15, 23, 31], "tokens_per_second": 2, "temporal_patch_size": 2,
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HUB)
def test_configs_of_the_hub(name):
    config = from_transformers(HUB[name])
    rows = BACKBONES[name].text.vocab_size
    assert dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=rows)) == BACKBONES[name]


def edited(name: str, **changes) -> dict:
    mapping = json.loads(json.dumps(HUB[name]))
    vision = changes.pop("vision", {})
    return {**mapping, **changes, "vision_config": {**mapping["vision_config"], **vision}}


BAD_CONFIGS = {
    "use_sliding_window is True": edited("qwen2_vl_7b", use_sliding_window=True),
    "hidden_act is 'gelu'": edited("qwen2_vl_7b", vision={"hidden_act": "gelu"}),
    "fullatt_block_indexes is": edited("qwen2_5_vl_7b", vision={"fullatt_block_indexes": [7, 40]}),
    "window_size is 100": edited("qwen2_5_vl_7b", vision={"window_size": 100}),
    "window_size is 112": edited("qwen2_vl_7b", vision={"window_size": 112}),
    "rope_type is 'yarn'": edited("qwen2_vl_7b", rope_scaling={"type": "yarn", "mrope_section": [16, 24, 24]}),
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_bad_configs_are_refused(message):
    with pytest.raises(UserError, match=message):
        from_transformers(BAD_CONFIGS[message])


def test_old_names_of_tensors_load_as_the_new(tmp_path):
    """The same weights under the names of transformers before 4.52 and of now."""
    oracle = reward_oracle.base_model("qwen2_vl")
    state = {name: value.numpy().copy() for name, value in oracle.state_dict().items()}
    old = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): value
        for name, value in state.items()
    }
    assert "visual.merger.ln_q.weight" in old and "model.layers.1.mlp.up_proj.weight" in old
    found = []
    for folder, tensors in ((tmp_path / "new", state), (tmp_path / "old", old)):
        oracle.config.save_pretrained(folder)
        safetensors.numpy.save_file(tensors, folder / load.SINGLE)
        found.append(load.load_qwen_vl(folder)[1])
    jax.tree.map(np.testing.assert_array_equal, *found)
    assert count(found[0]) == sum(parameter.numel() for parameter in oracle.model.parameters())
    safetensors.numpy.save_file({**old, "model.norm.bias": np.zeros(64, "f4")}, tmp_path / "old" / load.SINGLE)
    with pytest.raises(UserError, match=r"language_model\.norm\.bias is not a tensor of this architecture"):
        load.load_qwen_vl(tmp_path / "old")


@pytest.mark.slow
@pytest.mark.parametrize("name", HUB)
def test_the_7b_models_have_the_released_tensors(name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    kinds = {"qwen2_vl_7b": "Qwen2VL", "qwen2_5_vl_7b": "Qwen2_5_VL"}
    model = QwenVL(from_transformers(HUB[name]), jnp.bfloat16, jnp.bfloat16)
    shapes = abstract_params(model)
    with torch.device("meta"):
        config = getattr(transformers, f"{kinds[name]}Config")(**HUB[name])
        reference = getattr(transformers, f"{kinds[name]}Model")(config)
    slots = load.expected_tensors(shapes, model.config)
    assert {name: slot.shape for name, slot in slots.items()} == {
        name: tuple(parameter.shape) for name, parameter in reference.named_parameters()
    }
    assert count(shapes) == {"qwen2_vl_7b": 7_746_378_240, "qwen2_5_vl_7b": 7_747_169_280}[name]
