"""Loading Qwen3-VL: strictly, from one file or from shards; its configs; the released size."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util
from jax.sharding import NamedSharding, PartitionSpec
from qwen_oracle import QWEN3_VL_2B

from dreamlite_jax.errors import UserError
from dreamlite_jax.models.qwen_vl import load
from dreamlite_jax.models.qwen_vl.config import from_transformers
from dreamlite_jax.models.qwen_vl.model import QwenVL, abstract_params, param_shardings
from dreamlite_jax.training.loop import count


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
    assert count(loaded[1]) == sum(parameter.numel() for parameter in oracle.model.parameters())


def test_shards_load_as_the_single_file(oracle, loaded, tmp_path):
    oracle.save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same(load.load_qwen_vl(tmp_path)[1], loaded[1])
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"lacks {shard.name}, which {load.INDEX} names"):
        load.load_qwen_vl(tmp_path)


def test_an_untied_head_is_not_needed_and_not_minded(loaded, copy):
    rewrite(copy, lambda tensors: tensors.update({"lm_head.weight": np.zeros((128, 64), np.float32)}))
    assert_same(load.load_qwen_vl(copy)[1], loaded[1])


NORM = "model.language_model.layers.3.self_attn.q_norm.weight"
TABLE = "model.language_model.embed_tokens.weight"
BAD_TENSORS = {
    "missing": (
        lambda tensors: tensors.pop(NORM),
        r"language_model\.layers\.3\.self_attn\.q_norm\.weight is missing \(nearest: language_model\.layers\.",
    ),
    "renamed": (
        lambda tensors: tensors.update({NORM.replace("q_norm", "query_norm"): tensors.pop(NORM)}),
        r"q_norm\.weight is missing \(nearest: language_model\.layers\.3\.self_attn\.query_norm\.weight\)",
    ),
    "extra": (
        lambda tensors: tensors.update({"model.language_model.layers.4.mlp.up_proj.weight": np.zeros((96, 64), "f4")}),
        r"language_model\.layers\.4\.mlp\.up_proj\.weight is not a tensor of this architecture \(nearest: ",
    ),
    "misshapen": (
        lambda tensors: tensors.update({TABLE: tensors[TABLE][:120].copy()}),
        r"embed_tokens\.weight has shape \(120, 64\) and must have \(128, 64\)",
    ),
    "integers": (
        lambda tensors: tensors.update({TABLE: tensors[TABLE].astype(np.int8)}),
        r"embed_tokens\.weight is stored as I8; it must be one of",
    ),
    "many": (lambda tensors: [tensors.pop(name) for name in list(tensors)[:9]], r"is missing.*; and 4 more"),
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


@pytest.mark.slow
def test_2b_has_the_released_size():
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = QwenVL(from_transformers(QWEN3_VL_2B), jnp.bfloat16, jnp.bfloat16)
    shapes = abstract_params(model)
    with torch.device("meta"):
        reference = transformers.Qwen3VLModel(transformers.Qwen3VLConfig(**QWEN3_VL_2B))
    assert count(shapes) == sum(p.numel() for p in reference.parameters()) == 2_127_532_032
    slots = load.expected_tensors(shapes, model.config)
    assert {name: slot.shape for name, slot in slots.items()} == {
        name: tuple(p.shape) for name, p in reference.named_parameters()
    }


@pytest.mark.slow
def test_2b_lowers_over_a_mesh(mesh):
    """The whole step of the 2B model, parameters split over fsdp: traced and lowered, not run."""
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    model = QwenVL(from_transformers(QWEN3_VL_2B), jnp.bfloat16, jnp.bfloat16, sharding=rows)
    shapes = abstract_params(model)
    shardings = param_shardings(shapes, mesh)
    pairs = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    split = sum(count(leaf) for leaf, sharding in pairs if "fsdp" in sharding.spec)
    assert split > 0.999 * count(shapes)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
    ids = jax.ShapeDtypeStruct((8, 384), jnp.int32, sharding=rows)
    positions = jax.ShapeDtypeStruct((3, 8, 384), jnp.int32)
    patches = jax.ShapeDtypeStruct((8, 1, 1024, 1536), jnp.float32, sharding=rows)
    lowered = jax.jit(lambda p, *x: model.apply({"params": p}, *x, (32, 32))).lower(
        params, ids, ids, positions, patches
    )
    assert lowered.out_info.shape == (8, 384, 2048)
