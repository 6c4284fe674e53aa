"""Qwen3-VL towers against transformers on random weights, the strict loader, and sharding."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dreamlite_jax.errors import UserError
from dreamlite_jax.models.qwen_vl import load, rope
from dreamlite_jax.models.qwen_vl.config import TextTowerConfig, from_transformers
from dreamlite_jax.models.qwen_vl.model import QwenVL, abstract_params, count_params, param_shardings
from dreamlite_jax.models.qwen_vl.text import TextTower

TEXT_TOLERANCE = 2e-5  # largest absolute difference of a state; states are of order 1
IMAGE_TOLERANCE = 5e-5
GRADIENT_TOLERANCE = 1e-4  # relative, in the 2-norm
IMAGE, START, END = 101, 102, 103
GRID = (8, 12)  # not square, so that rows and columns cannot be swapped
TOKENS = GRID[0] * GRID[1] // 4

TEXT_SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
VISION_SIZES = {
    "depth": 4, "hidden_size": 48, "intermediate_size": 80, "num_heads": 4, "out_hidden_size": 64,
    "num_position_embeddings": 100, "deepstack_visual_indexes": [0, 2],
}  # fmt: skip
IDS = {"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END, "video_token_id": 104}


def randomize(module, seed: int = 1):
    """Every parameter away from its initial value, so that norms and biases are part of the comparison."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.08 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


@pytest.fixture(scope="module")
def oracle():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    rotary = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    config = transformers.Qwen3VLConfig(
        text_config={**TEXT_SIZES, "rope_parameters": rotary, "tie_word_embeddings": True},
        vision_config=VISION_SIZES,
        tie_word_embeddings=True,
        **IDS,
    )
    return randomize(transformers.Qwen3VLForConditionalGeneration(config))


@pytest.fixture(scope="module")
def folder(oracle, tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen3_vl")
    oracle.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    return load.load_qwen_vl(folder)


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


def oracle_states(oracle, batch: Batch) -> np.ndarray:
    """`hidden_states[-1]`, as the pipelines take it."""
    import torch

    with torch.no_grad():
        return oracle(**oracle_inputs(batch), output_hidden_states=True).hidden_states[-1].numpy()


@pytest.fixture(scope="module")
def text_states(oracle, text_batch):
    return oracle_states(oracle, text_batch)


@pytest.fixture(scope="module")
def image_states(oracle, image_batch):
    return oracle_states(oracle, image_batch)


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


def test_text_equals_transformers(loaded, text_batch, text_states):
    assert difference(*loaded, text_batch, text_states) <= TEXT_TOLERANCE


def test_images_equal_transformers(loaded, image_batch, image_states):
    assert difference(*loaded, image_batch, image_states) <= IMAGE_TOLERANCE


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
    rotary = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 6, 6]}
    sizes = {**TEXT_SIZES, "hidden_size": 128, "rms_norm_eps": 1e-6}
    sizes.pop("head_dim")
    config = transformers.models.qwen2_5_vl.Qwen2_5_VLTextConfig(**sizes, rope_parameters=rotary)
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


# ------------------------------------------------------------------------------------------------------------- loader


@pytest.fixture
def copy(folder, tmp_path):
    """A writable copy of the folder."""
    shutil.copytree(folder, tmp_path / "copy")
    return tmp_path / "copy"


def rewrite(folder, change) -> None:
    tensors = safetensors.numpy.load_file(folder / load.SINGLE)
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / load.SINGLE)


def assert_same(params, other) -> None:
    flat, other = traverse_util.flatten_dict(params), traverse_util.flatten_dict(other)
    assert flat.keys() == other.keys()
    for key in flat:
        np.testing.assert_array_equal(flat[key], other[key], err_msg=str(key))


def test_every_parameter_comes_from_the_checkpoint(oracle, loaded):
    assert count_params(loaded[1]) == sum(parameter.numel() for parameter in oracle.model.parameters())


def test_shards_load_as_the_single_file(oracle, loaded, tmp_path):
    oracle.save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(load.load_qwen_vl(tmp_path)[1], loaded[1])
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name} does not exist"):
        load.load_qwen_vl(tmp_path)


def test_an_untied_head_is_not_needed_and_not_minded(loaded, copy):
    rewrite(copy, lambda tensors: tensors.update({"lm_head.weight": np.zeros((128, 64), np.float32)}))
    assert_same(load.load_qwen_vl(copy)[1], loaded[1])


def test_transposed_weights_are_caught(folder, loaded, image_batch, image_states):
    """The square output projection of the vision tower has the same shape transposed: only numbers tell."""
    model, params = loaded
    flat = traverse_util.flatten_dict(params)
    key = ("visual", "blocks", "attn", "proj", "kernel")
    flat[key] = flat[key].swapaxes(1, 2)
    assert difference(model, traverse_util.unflatten_dict(flat), image_batch, image_states) > 20 * IMAGE_TOLERANCE


NORM = "model.language_model.layers.3.self_attn.q_norm.weight"
TABLE = "model.language_model.embed_tokens.weight"
BAD_TENSORS = {
    "missing": (
        lambda tensors: tensors.pop(NORM),
        r"tensor language_model\.layers\.3\.self_attn\.q_norm\.weight is missing \(nearest: language_model\.layers\.",
    ),
    "renamed": (
        lambda tensors: tensors.update({NORM.replace("q_norm", "query_norm"): tensors.pop(NORM)}),
        r"q_norm\.weight is missing \(nearest: language_model\.layers\.3\.self_attn\.query_norm\.weight\)",
    ),
    "extra": (
        lambda tensors: tensors.update({"model.language_model.layers.4.mlp.up_proj.weight": np.zeros((96, 64), "f4")}),
        r"language_model\.layers\.4\.mlp\.up_proj\.weight is unknown \(nearest: language_model\.layers\.",
    ),
    "misshapen": (
        lambda tensors: tensors.update({TABLE: tensors[TABLE][:120].copy()}),
        r"embed_tokens\.weight has shape \(120, 64\); config.json asks for \(128, 64\)",
    ),
    "integers": (
        lambda tensors: tensors.update({TABLE: tensors[TABLE].astype(np.int8)}),
        r"embed_tokens\.weight is stored as I8; it must be one of",
    ),
    "many": (lambda tensors: [tensors.pop(name) for name in list(tensors)[:9]], r"is missing.*\(and 4 more\)"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_tensors_that_do_not_fit(copy, name):
    change, message = BAD_TENSORS[name]
    rewrite(copy, change)
    with pytest.raises(UserError, match=message):
        load.load_qwen_vl(copy)


@pytest.mark.parametrize("keep", [-1, -100_000, 2_000, 100])
def test_truncated_file(copy, keep):
    path = copy / load.SINGLE
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    with pytest.raises(UserError, match=rf"is truncated: it has {len(whole[:keep])} bytes and its header promises \d+"):
        load.load_qwen_vl(copy)


def test_files_of_another_kind(copy):
    path = copy / load.SINGLE
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    with pytest.raises(UserError, match="is not a safetensors file"):
        load.load_qwen_vl(copy)
    path.unlink()
    with pytest.raises(UserError, match="does not exist; the folder has no safetensors file"):
        load.load_qwen_vl(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        load.load_qwen_vl(copy)
    (copy / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json does not exist"):
        load.load_qwen_vl(copy)


# ------------------------------------------------------------------------------------------------------------- config

# config.json of Qwen3-VL-2B in the layout of transformers 4.57, which the released weights have.
QWEN3_VL_2B = {
    "model_type": "qwen3_vl",
    "image_token_id": 151655, "vision_start_token_id": 151652, "vision_end_token_id": 151653, "video_token_id": 151656,
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "qwen3_vl_text", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "hidden_act": "silu", "attention_bias": False, "rms_norm_eps": 1e-6, "rope_theta": 5000000,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "tie_word_embeddings": True,
    },
    "vision_config": {
        "model_type": "qwen3_vl", "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16,
        "out_hidden_size": 2048, "deepstack_visual_indexes": [5, 11, 17], "hidden_act": "gelu_pytorch_tanh",
        "in_channels": 3, "patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2,
        "num_position_embeddings": 2304,
    },
}  # fmt: skip


def test_both_layouts_of_the_rotary_fields(folder):
    config = from_transformers(QWEN3_VL_2B)
    assert (config.text.rope_theta, config.text.mrope_section) == (5e6, (24, 20, 20))
    assert load.read_config(folder).text.mrope_section == (6, 5, 5)  # transformers 5 wrote this one


def edited(**sections) -> dict:
    """QWEN3_VL_2B with values changed, or removed where the new value is None."""
    mapping = json.loads(json.dumps(QWEN3_VL_2B))
    for section, values in sections.items():
        target = mapping if section == "top" else mapping[section]
        target.update(values)
        for key in [key for key, value in values.items() if value is None]:
            del target[key]
    return mapping


BAD_CONFIGS = {
    "model_type is 'llama'": edited(top={"model_type": "llama"}),
    "vision_config is missing": edited(top={"vision_config": None}),
    "num_layers is missing": edited(text_config={"num_hidden_layers": None}),
    "hidden_act is 'gelu'": edited(text_config={"hidden_act": "gelu"}),
    "attention_bias is True": edited(text_config={"attention_bias": True}),
    "rope_type is 'yarn'": edited(text_config={"rope_scaling": {"rope_type": "yarn", "mrope_section": [24, 20, 20]}}),
    "adds up to 60": edited(text_config={"rope_scaling": {"mrope_section": [20, 20, 20]}}),
    "not a multiple of num_key_value_heads 5": edited(text_config={"num_key_value_heads": 5}),
    "out_hidden_size is 1024 but": edited(vision_config={"out_hidden_size": 1024}),
    "increasing block numbers below depth 24": edited(vision_config={"deepstack_visual_indexes": [5, 11, 24]}),
    "not a square number": edited(vision_config={"num_position_embeddings": 2300}),
    "not a multiple of 4 x num_heads": edited(vision_config={"num_heads": 24}),
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_bad_config_is_refused(message):
    with pytest.raises(UserError, match=message):
        from_transformers(BAD_CONFIGS[message])


def test_an_image_cut_short_is_refused():
    ids = np.array([[1, START, *[IMAGE] * (TOKENS - 1), END]])
    with pytest.raises(ValueError, match=f"{TOKENS} consecutive image tokens"):
        rope.multimodal_positions(ids, np.ones_like(ids), IMAGE, GRID)


# ---------------------------------------------------------------------------------------------------- size and devices


@pytest.mark.slow
def test_2b_has_the_released_size():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = QwenVL(from_transformers(QWEN3_VL_2B), jnp.bfloat16, jnp.bfloat16)
    shapes = abstract_params(model)
    with torch.device("meta"):
        reference = transformers.Qwen3VLModel(transformers.Qwen3VLConfig(**QWEN3_VL_2B))
    assert count_params(shapes) == sum(p.numel() for p in reference.parameters()) == 2_127_532_032
    slots = load.expected_tensors(shapes, model.config)
    assert {name: slot.shape for name, slot in slots.items()} == {
        name: tuple(p.shape) for name, p in reference.named_parameters()
    }


@functools.cache
def mesh():
    return jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:8])


@pytest.mark.slow
def test_2b_lowers_over_a_mesh():
    """The whole step of the 2B model, parameters split over fsdp: traced and lowered, not run."""
    rows = NamedSharding(mesh(), PartitionSpec(("data", "fsdp")))
    model = QwenVL(from_transformers(QWEN3_VL_2B), jnp.bfloat16, jnp.bfloat16, sharding=rows)
    shapes = abstract_params(model)
    shardings = param_shardings(shapes, mesh())
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    split = sum(count_params(leaf) for leaf, sharding in pairs if "fsdp" in sharding.spec)
    assert split > 0.999 * count_params(shapes)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    ids = jax.ShapeDtypeStruct((8, 384), jnp.int32, sharding=rows)
    positions = jax.ShapeDtypeStruct((3, 8, 384), jnp.int32)
    patches = jax.ShapeDtypeStruct((8, 1, 1024, 1536), jnp.float32, sharding=rows)
    lowered = jax.jit(lambda p, *x: model.apply({"params": p}, *x, (32, 32))).lower(
        params, ids, ids, positions, patches
    )
    assert lowered.out_info.shape == (8, 384, 2048)


@pytest.mark.slow
def test_sharded_states_and_gradients_are_the_same(folder, loaded, image_batch):
    batch = Batch(
        *(np.repeat(x, 4, 0) for x in (image_batch.ids, image_batch.mask)),
        np.repeat(image_batch.positions, 4, 1),
        np.repeat(image_batch.patches, 4, 0),
    )
    model, params = load.load_qwen_vl(folder, mesh=mesh())
    kernel = params["language_model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (4, 64, 24)
    rows = NamedSharding(mesh(), PartitionSpec(("data", "fsdp")))
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
