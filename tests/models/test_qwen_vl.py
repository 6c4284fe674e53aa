"""Qwen3-VL towers against transformers on random weights, and sharding."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec
from qwen_oracle import END, IMAGE, START, TEXT_SIZES, randomize, rotary, watch

from dreamlite_jax.models.qwen_vl import load, rope
from dreamlite_jax.models.qwen_vl.config import TextTowerConfig
from dreamlite_jax.models.qwen_vl.model import QwenVL
from dreamlite_jax.models.qwen_vl.text import TextTower

TEXT_TOLERANCE = 2e-5  # largest absolute difference of a state; states are of order 1
IMAGE_TOLERANCE = 5e-5
GRADIENT_TOLERANCE = 1e-4  # relative, in the 2-norm
STATES = ("before_norm", "after_norm")
GRID = (8, 12)  # not square, so that rows and columns cannot be swapped
TOKENS = GRID[0] * GRID[1] // 4


@dataclasses.dataclass(frozen=True)
class Batch:
    ids: np.ndarray
    mask: np.ndarray
    positions: np.ndarray
    patches: np.ndarray | None = None


def padded(rows) -> tuple[np.ndarray, np.ndarray]:
    """Rows of ids to the right-padded batch; the padding is a real word, so that only the mask keeps it out."""
    ids = np.full((len(rows), max(map(len, rows))), 7, np.int32)
    mask = np.zeros(ids.shape, np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return ids, mask


@pytest.fixture(scope="module")
def text_batch():
    rng = np.random.default_rng(0)
    ids, mask = padded([rng.integers(1, 100, n) for n in (20, 13, 1)])
    return Batch(ids, mask, rope.text_positions(mask))


@pytest.fixture(scope="module")
def image_batch():
    """Two samples of two images each, with texts of different length around them."""
    rng = np.random.default_rng(1)
    picture = [START, *[IMAGE] * TOKENS, END]
    rows = [
        [*rng.integers(1, 100, 12), *picture, *rng.integers(1, 100, between), *picture, *rng.integers(1, 100, after)]
        for between, after in ((3, 9), (1, 4))
    ]
    ids, mask = padded(rows)
    patches = rng.standard_normal((2, 2, GRID[0] * GRID[1], 3 * 2 * 16 * 16)).astype(np.float32)
    return Batch(ids, mask, rope.multimodal_positions(ids, mask, IMAGE, GRID), patches)


def oracle_inputs(batch: Batch) -> dict:
    import torch

    inputs = {"input_ids": torch.from_numpy(batch.ids).long(), "attention_mask": torch.from_numpy(batch.mask).long()}
    if batch.patches is not None:
        inputs["pixel_values"] = torch.from_numpy(batch.patches.reshape(-1, batch.patches.shape[-1]).copy())
        inputs["image_grid_thw"] = torch.tensor([[1, *GRID]] * (batch.patches.shape[0] * batch.patches.shape[1]))
        inputs["mm_token_type_ids"] = torch.from_numpy((batch.ids == IMAGE).astype(np.int32))
    return inputs


@pytest.fixture(scope="module")
def both_states(oracle, text_batch, image_batch):
    """By (kind of batch, side of the final norm): what hooks on the last layer and on the norm see."""
    import torch

    seen, found = watch(oracle), {}
    for kind, batch in (("text", text_batch), ("images", image_batch)):
        with torch.no_grad():
            oracle.model(**oracle_inputs(batch))
        found |= {(kind, state): seen[state].numpy() for state in STATES}
    return found


@pytest.fixture(scope="module")
def text_states(both_states):
    return both_states["text", "after_norm"]


@pytest.fixture(scope="module")
def image_states(both_states):
    return both_states["images", "after_norm"]


def forward(model, params, batch: Batch):
    grid = None if batch.patches is None else GRID
    run = jax.jit(lambda *inputs: model.apply({"params": params}, *inputs, grid))
    return run(batch.ids, batch.mask, batch.positions, batch.patches)


def difference(model, params, batch: Batch, expected: np.ndarray) -> float:
    """The parity check itself; the negative controls go through the same one."""
    states = forward(model, params, batch)
    assert states.shape == expected.shape
    assert states.dtype == jnp.float32
    return float(np.abs(np.asarray(states) - expected)[batch.mask > 0].max())


def changed(model: QwenVL, tower: str, **fields) -> QwenVL:
    section = dataclasses.replace(getattr(model.config, tower), **fields)
    return model.clone(config=dataclasses.replace(model.config, **{tower: section}))


# ------------------------------------------------------------------------------------------------------------- parity


@pytest.fixture(scope="module")
def towers(folder, loaded):
    """Ours, by the state that they give."""
    return {"before_norm": load.load_qwen_vl(folder, final_norm=False), "after_norm": loaded}


@pytest.mark.parametrize("kind, tolerance", [("text", TEXT_TOLERANCE), ("images", IMAGE_TOLERANCE)])
def test_both_states_equal_transformers(towers, both_states, text_batch, image_batch, kind, tolerance):
    batch = text_batch if kind == "text" else image_batch
    found = {(a, b): difference(*towers[a], batch, both_states[kind, b]) for a in STATES for b in STATES}
    assert max(found[state, state] for state in STATES) <= tolerance
    assert min(found[a, b] for a in STATES for b in STATES if a != b) > 1e4 * tolerance  # the other side of the norm


def test_a_tower_without_the_norm_does_not_hold_it(towers):
    (_, before), (_, after) = towers["before_norm"], towers["after_norm"]
    assert set(after["language_model"]) - set(before["language_model"]) == {"norm"}


def test_positions_equal_transformers(oracle, image_batch):
    inputs = oracle_inputs(image_batch)
    expected, _ = oracle.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], inputs["image_grid_thw"], None, inputs["attention_mask"]
    )
    np.testing.assert_array_equal(image_batch.positions, expected.numpy())


@pytest.mark.parametrize("remat", [False, True])
def test_pixel_gradients_equal_transformers(oracle, loaded, image_batch, remat):
    torch = pytest.importorskip("torch")
    weights = np.random.default_rng(2).standard_normal((*image_batch.ids.shape, 64)).astype(np.float32)
    weights *= image_batch.mask[..., None]
    inputs = oracle_inputs(image_batch)
    inputs["pixel_values"].requires_grad_(True)
    (oracle.model(**inputs).last_hidden_state * torch.from_numpy(weights)).sum().backward()
    expected = inputs["pixel_values"].grad.numpy().reshape(image_batch.patches.shape)

    model, params = loaded
    model = model.clone(remat=remat)

    def loss(patches):
        return (forward(model, params, dataclasses.replace(image_batch, patches=patches)) * weights).sum()

    gradient = np.asarray(jax.grad(loss)(jnp.asarray(image_batch.patches)))
    assert np.linalg.norm(expected) > 1.0
    assert np.linalg.norm(gradient - expected) / np.linalg.norm(expected) <= GRADIENT_TOLERANCE


WRONG_TOWERS = {
    "mrope section": ("text", {"mrope_section": (14, 1, 1)}),
    "mrope contiguous": ("text", {"mrope_interleaved": False}),
    "theta": ("text", {"rope_theta": 1e6}),
    "vision theta": ("vision", {"rope_theta": 1e5}),
    "deepstack layer": ("vision", {"deepstack_indexes": (0, 3)}),
}


@pytest.mark.parametrize("name", WRONG_TOWERS)
def test_wrong_tower_is_caught(loaded, image_batch, image_states, name):
    model, params = loaded
    tower, fields = WRONG_TOWERS[name]
    assert difference(changed(model, tower, **fields), params, image_batch, image_states) > 20 * IMAGE_TOLERANCE


def test_wrong_inputs_are_caught(loaded, image_batch, image_states, text_batch, text_states):
    one_axis = dataclasses.replace(image_batch, positions=rope.text_positions(image_batch.mask))
    assert difference(*loaded, one_axis, image_states) > 20 * IMAGE_TOLERANCE
    swapped = dataclasses.replace(image_batch, patches=image_batch.patches[:, ::-1].copy())
    assert difference(*loaded, swapped, image_states) > 20 * IMAGE_TOLERANCE
    left = dataclasses.replace(text_batch, mask=text_batch.mask * (np.arange(20) != 2))
    states = np.asarray(forward(*loaded, left))
    assert np.abs(states - text_states)[:2, 3:13].max() > 20 * TEXT_TOLERANCE  # a masked key is not seen


def test_theta_is_caught_on_text(loaded, text_batch, text_states):
    model, params = loaded
    assert difference(changed(model, "text", rope_theta=1e6), params, text_batch, text_states) > 20 * TEXT_TOLERANCE


def test_transposed_weights_are_caught(folder, loaded, image_batch, image_states):
    """The square output projection of the vision tower has the same shape transposed: only numbers tell."""
    model, params = loaded
    flat = traverse_util.flatten_dict(params)
    key = ("visual", "blocks", "attn", "proj", "kernel")
    flat[key] = flat[key].swapaxes(1, 2)
    assert difference(model, traverse_util.unflatten_dict(flat), image_batch, image_states) > 20 * IMAGE_TOLERANCE


def test_fully_masked_rows_are_finite(loaded, text_batch):
    states = forward(*loaded, dataclasses.replace(text_batch, mask=np.zeros_like(text_batch.mask)))
    assert np.isfinite(np.asarray(states)).all()


def test_bfloat16(folder, image_batch, image_states):
    model, params = load.load_qwen_vl(folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    states = forward(model, params, image_batch)
    assert states.dtype == jnp.bfloat16
    error = np.asarray(states.astype(jnp.float32)) - image_states
    relative = np.linalg.norm(error[image_batch.mask > 0]) / np.linalg.norm(image_states[image_batch.mask > 0])
    assert 1e-4 < relative < 0.03  # about 8 bits of mantissa through 4 layers; exact would mean no bfloat16


def test_text_tower_computes_qwen2_5_vl(text_batch):
    """The same tower without q/k norm, with biases and contiguous M-RoPE is that of the reward models' backbones."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {**TEXT_SIZES, "hidden_size": 128, "rms_norm_eps": 1e-6}
    sizes.pop("head_dim")
    config = transformers.models.qwen2_5_vl.Qwen2_5_VLTextConfig(**sizes, **rotary(1e6, [4, 6, 6]))
    reference = randomize(transformers.models.qwen2_5_vl.Qwen2_5_VLTextModel(config))
    ids, mask = torch.from_numpy(text_batch.ids).long(), torch.from_numpy(text_batch.mask).long()
    # Positions that differ by axis, as image tokens have them.
    positions = text_batch.positions + np.arange(3, dtype=np.int32)[:, None, None] * (text_batch.ids[None] % 5)
    with torch.no_grad():
        expected = reference(ids, attention_mask=mask, position_ids=torch.from_numpy(positions).long())[0].numpy()

    tower = TextTower(TextTowerConfig(128, 128, 96, 4, 4, 2, 32, 1e6, (4, 6, 6), False, False, True))
    inputs = tuple(map(jnp.asarray, (text_batch.ids, positions, text_batch.mask)))

    def whole(tower, ids, positions, mask):
        return tower(tower.embed(ids), positions, mask)

    shapes = jax.eval_shape(lambda: tower.init(jax.random.key(0), *inputs, method=whole))["params"]
    state = {name: value.numpy() for name, value in reference.state_dict().items()}

    def filled(path, leaf):
        key = load.keys(path)
        layers = range(leaf.shape[0]) if "layers" in key else (None,)
        values = [load.to_ours(key, state.pop(load.torch_name(key, layer))) for layer in layers]
        return np.stack(values) if "layers" in key else values[0]

    params = jax.tree_util.tree_map_with_path(filled, shapes)
    assert not state, f"tensors without a place: {sorted(state)}"
    states = np.asarray(jax.jit(functools.partial(tower.apply, method=whole))({"params": params}, *inputs))
    assert np.abs(states - expected)[text_batch.mask > 0].max() <= TEXT_TOLERANCE


def test_an_image_cut_short_is_refused():
    ids = np.array([[1, START, *[IMAGE] * (TOKENS - 1), END]])
    with pytest.raises(ValueError, match=f"{TOKENS} consecutive image tokens"):
        rope.multimodal_positions(ids, np.ones_like(ids), IMAGE, GRID)


# ------------------------------------------------------------------------------------------------------------ devices


@pytest.mark.slow
def test_sharded_states_and_gradients_are_the_same(folder, loaded, image_batch, mesh):
    batch = Batch(
        *(np.repeat(x, 4, 0) for x in (image_batch.ids, image_batch.mask)),
        np.repeat(image_batch.positions, 4, 1),
        np.repeat(image_batch.patches, 4, 0),
    )
    model, params = load.load_qwen_vl(folder, mesh=mesh)
    kernel = params["language_model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (4, 64, 24)
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    placed = [jax.device_put(x, rows) for x in (batch.ids, batch.mask, batch.patches)]

    def run(model, params, ids, mask, patches):
        def states(patches):
            return model.apply({"params": params}, ids, mask, jnp.asarray(batch.positions), patches, GRID)

        value, pull = jax.vjp(states, patches)
        return value, pull(jnp.cos(value))[0]

    sharded = jax.jit(functools.partial(run, model))(params, *placed)
    single = jax.jit(functools.partial(run, loaded[0]))(loaded[1], batch.ids, batch.mask, batch.patches)
    for got, expected in zip(sharded, single, strict=True):
        assert len(got.sharding.device_set) == 8
        np.testing.assert_allclose(np.asarray(got), np.asarray(expected), atol=1e-5)
