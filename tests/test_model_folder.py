"""The model folder: what is written is what is read, strictly, and a folder is complete or not there."""

import dataclasses
import json
import re

import jax
import ml_dtypes
import numpy as np
import oracles
import pytest

from dreamlite_jax import finite, model_folder
from dreamlite_jax.config import ModelConfig, VAEConfig
from dreamlite_jax.errors import UserError
from dreamlite_jax.tensor_files import open_tensors, read_metadata, stored_tensors, write_tensors

VAE = VAEConfig(width=8, encoder_blocks=(1, 1, 1, 1), decoder_blocks=(1, 1, 1, 1))
CONFIG = ModelConfig(unet=dataclasses.replace(oracles.SMALL_UNET, ff_mult=2), vae=VAE, steps=9, native_size=64)
PROVENANCE = {"command": "test", "sources": ["a", {"b": 1}]}


def random_params(seed: int = 0, config: ModelConfig = CONFIG):
    rng = np.random.default_rng(seed)
    return {
        name: model_folder.unflatten(
            {
                path: rng.standard_normal(shape, np.float32)
                for path, shape in model_folder.expected_shapes(name, getattr(config, name)).items()
            }
        )
        for name in model_folder.COMPONENTS
    }


PARAMS = random_params()


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture
def folder(tmp_path):
    return model_folder.save_model(tmp_path / "model", CONFIG, PARAMS, PROVENANCE)


def test_what_is_saved_is_loaded(folder):
    assert model_folder.load_config(folder) == CONFIG
    assert model_folder.load_provenance(folder) == PROVENANCE
    for component, tree in PARAMS.items():
        assert_equal(model_folder.load_params(folder, component), tree)
    assert sorted(p.name for p in folder.iterdir()) == ["model.json", "unet.safetensors", "vae.safetensors"]
    assert [p.name for p in folder.parent.iterdir()] == ["model"]  # nothing temporary is left


def test_arrays_of_jax_and_views_are_saved_by_value(tmp_path):
    turned = jax.tree.map(lambda x: np.asfortranarray(x) if x.ndim > 1 else jax.numpy.asarray(x), PARAMS)
    folder = model_folder.save_model(tmp_path / "model", CONFIG, turned, {})
    assert_equal(model_folder.load_params(folder, "unet"), PARAMS["unet"])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision(tmp_path, dtype):
    folder = model_folder.save_model(tmp_path / "model", CONFIG, PARAMS, {}, dtype=dtype)
    stored = model_folder.load_params(folder, "vae", dtype=None)
    assert_equal(stored, jax.tree.map(lambda x: x.astype(dtype), PARAMS["vae"]))
    assert {leaf.dtype for leaf in jax.tree.leaves(stored)} == {np.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(model_folder.load_params(folder, "vae"))} == {np.dtype(np.float32)}


def test_an_existing_model_is_only_replaced_when_asked(folder):
    other = random_params(1)
    with pytest.raises(UserError, match="not empty"):
        model_folder.save_model(folder, CONFIG, other, {})
    assert_equal(model_folder.load_params(folder, "unet"), PARAMS["unet"])
    model_folder.save_model(folder, CONFIG, other, {"new": True}, replace=True)
    assert model_folder.load_provenance(folder) == {"new": True}
    assert_equal(model_folder.load_params(folder, "unet"), other["unet"])
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


def test_replacing_without_the_exchange_of_linux(folder, monkeypatch):
    monkeypatch.setattr(model_folder, "_exchange", lambda a, b: False)
    model_folder.save_model(folder, CONFIG, random_params(1), {"new": True}, replace=True)
    assert model_folder.load_provenance(folder) == {"new": True}
    assert [p.name for p in folder.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_leaves_what_was_there(folder, monkeypatch, existing):
    target = folder if existing else folder.parent / "other"

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(model_folder, "write_manifest", fail)
    with pytest.raises(OSError, match="disk full"):
        model_folder.save_model(target, CONFIG, random_params(1), {}, replace=True)
    assert [p.name for p in folder.parent.iterdir()] == ["model"]
    assert_equal(model_folder.load_params(folder, "unet"), PARAMS["unet"])


def test_more_folders_are_copied_in(tmp_path):
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "a.txt").write_text("x")
    folder = model_folder.save_model(tmp_path / "model", CONFIG, PARAMS, {}, folders={"tokenizer": tmp_path / "tokens"})
    assert (folder / "tokenizer" / "a.txt").read_text() == "x"


def rewrite(path, change):
    """Changes the tensors of a file."""
    with open_tensors(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors)
    write_tensors(path, tensors)


NAME = "down_blocks_0/attentions_0/transformer_blocks_0/attn2/to_q/kernel"
DAMAGE = {
    "missing": (lambda t: t.pop(NAME), [NAME, "is missing"]),
    "renamed": (lambda t: t.update({f"{NAME}s": t.pop(NAME)}), ["is missing", f"(nearest: {NAME}s)"]),
    "extra": (lambda t: t.update({f"{NAME}s": t[NAME]}), [f"{NAME}s is not a tensor of this architecture"]),
    "misshapen": (lambda t: t.update({NAME: t[NAME][1:]}), [NAME, "(31, 32)", "(32, 32)"]),
    "integers": (lambda t: t.update({NAME: t[NAME].astype(np.int32)}), [NAME, "stored as", "F32"]),
    "another architecture": (
        lambda t: [t.update({n: t[n][..., 1:]}) for n in list(t)], ["checkpoint of another architecture"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_tensors_that_do_not_fit_are_named(folder, kind):
    change, words = DAMAGE[kind]
    rewrite(folder / "unet.safetensors", change)
    with pytest.raises(UserError) as error:
        model_folder.load_params(folder, "unet")
    assert all(word in str(error.value) for word in words), error.value


SCALES = f"{NAME}:scale"  # of the kernel in one byte


@pytest.mark.parametrize(
    ("dtype", "name", "value"),
    [
        (np.float32, NAME, np.nan),
        (np.float32, "conv_in/bias", -np.inf),
        (np.float16, NAME, np.inf),
        (ml_dtypes.bfloat16, NAME, np.nan),
        (ml_dtypes.bfloat16, "conv_out/kernel", np.inf),
        (np.int8, SCALES, np.nan),
        (np.int8, "conv_in/bias", np.inf),
    ],
)
def test_weights_that_are_no_numbers_are_named(tmp_path, dtype, name, value):
    folder = model_folder.save_model(tmp_path / "model", CONFIG, PARAMS, {}, dtype=dtype)

    def spoil(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name].flat[1] = value

    rewrite(folder / "unet.safetensors", spoil)
    model_folder.load_params(folder, "vae")
    for stored in (np.float32, None):
        with pytest.raises(UserError, match=rf"unet.safetensors: of {re.escape(name)} 1 of \d+ values are no finite"):
            model_folder.load_params(folder, "unet", dtype=stored)


def test_what_a_half_cannot_hold_is_not_written_as_infinity(folder, tmp_path):
    large = jax.tree.map(lambda leaf: leaf * np.float32(1e6), PARAMS)
    with pytest.warns(RuntimeWarning, match="overflow"), pytest.raises(UserError, match="no finite numbers"):
        model_folder.save_model(tmp_path / "half", CONFIG, large, {}, dtype=np.float16)
    whole = model_folder.save_model(tmp_path / "whole", CONFIG, large, {})
    with pytest.warns(RuntimeWarning, match="overflow"), pytest.raises(UserError, match=r"as float16: of .* no finite"):
        model_folder.load_params(whole, "vae", dtype=np.float16)
    assert_equal(model_folder.load_params(whole, "vae"), large["vae"])
    with pytest.raises(UserError, match=r"params\['vae'\]: of .* no finite numbers \(the first is nan"):
        broken = {**PARAMS, "vae": jax.tree.map(lambda leaf: leaf * np.nan, PARAMS["vae"])}
        model_folder.save_model(tmp_path / "broken", CONFIG, broken, {}, replace=True)
    assert not (tmp_path / "half").exists() and not (tmp_path / "broken").exists()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_finding_numbers_that_are_none(dtype):
    values = np.linspace(-3, 3, 2 * 262_144 + 7).astype(dtype)
    largest = (np.finfo(dtype) if dtype != ml_dtypes.bfloat16 else ml_dtypes.finfo(dtype)).max
    values[0], values[1] = largest, -largest
    assert finite.is_finite(values) and finite.fault(values.reshape(-1, 5)) == ""
    for place in (0, 262_143, 262_144, values.size - 1):
        for bad in (np.nan, np.inf, -np.inf):
            spoilt = values.copy()
            spoilt[place] = bad
            assert not finite.is_finite(spoilt)
            assert f"1 of {values.size} values" in finite.fault(spoilt) and f"at ({place},)" in finite.fault(spoilt)
    assert finite.is_finite(np.zeros((0, 3), dtype)) and finite.is_finite(np.arange(3))


@pytest.mark.parametrize(
    ("size", "message"),
    [(-1, "is truncated"), (-5000, "is truncated"), (2000, "is truncated"), (3, "not a safetensors")],
)
def test_truncated_files(folder, size, message):
    path = folder / "unet.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=message):
        model_folder.load_params(folder, "unet")


def test_params_of_another_config_are_not_saved(tmp_path):
    config = dataclasses.replace(CONFIG, unet=dataclasses.replace(CONFIG.unet, ff_mult=4))
    with pytest.raises(UserError, match=r"params\['unet'\]: .*net_0/proj/kernel has shape"):
        model_folder.save_model(tmp_path / "model", config, PARAMS, {})
    with pytest.raises(UserError, match="params has no 'vae'"):
        model_folder.save_model(tmp_path / "model", CONFIG, {"unet": PARAMS["unet"]}, {})
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_model_folder(folder, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        model_folder.load_config(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"lacks model.json, unet.safetensors, vae.safetensors$"):
        model_folder.load_config(tmp_path / "empty")
    (tmp_path / "empty" / "model_index.json").write_text("{}")
    with pytest.raises(UserError, match=r"conversion\.from_torch"):
        model_folder.load_config(tmp_path / "empty")
    (folder / "vae.safetensors").unlink()
    assert_equal(model_folder.load_params(folder, "unet"), PARAMS["unet"])
    with pytest.raises(UserError, match=r"lacks vae\.safetensors"):
        model_folder.load_params(folder, "vae")
    with pytest.raises(UserError, match="component is 'text'"):
        model_folder.load_params(folder, "text")


def test_bad_manifests(folder):
    path = folder / "model.json"
    good = json.loads(path.read_text())
    for bad, message in (
        ("{", "is not JSON"),
        ("[]", "must hold"),
        (json.dumps({**good, "format_version": 2}), "format_version is 2"),
        (json.dumps({**good, "extra": 1}), "must hold"),
        (json.dumps({**good, "config": {**good["config"], "stepz": 3}}), "config.stepz .* did you mean 'steps'"),
    ):
        path.write_text(bad)
        with pytest.raises(UserError, match=message):
            model_folder.load_config(folder)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_an_autoencoder_alone_is_one_file(tmp_path, dtype):
    path = model_folder.save_vae(tmp_path / "a" / "vae.safetensors", VAE, PARAMS["vae"], PROVENANCE, dtype=dtype)
    config, params = model_folder.load_vae(path)
    assert config == VAE
    assert_equal(params, jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), PARAMS["vae"]))
    assert model_folder.vae_manifest(path)["provenance"] == PROVENANCE
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_the_autoencoder_of_a_model_folder(folder):
    config, params = model_folder.load_vae(folder / "vae.safetensors")
    assert config == VAE
    assert_equal(params, PARAMS["vae"])


def test_a_file_that_is_no_autoencoder(folder, tmp_path):
    with pytest.raises(UserError, match="no dreamlite_vae"):
        model_folder.load_vae(folder / "unet.safetensors")
    with pytest.raises(UserError, match="does not exist"):
        model_folder.load_vae(tmp_path / "vae.safetensors")
    wide = dataclasses.replace(VAE, width=16)
    with pytest.raises(UserError, match="has shape"):
        model_folder.save_vae(tmp_path / "vae.safetensors", wide, PARAMS["vae"], {})


def test_the_shipped_autoencoder_loads():
    from dreamlite_jax.assets import SPRITES_VAE

    assert SPRITES_VAE.stat().st_size < 5_000_000
    config, params = model_folder.load_vae(SPRITES_VAE)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert config.latent_channels > 0
    assert "dreamlite_vae" in read_metadata(SPRITES_VAE)
    assert len(stored_tensors(SPRITES_VAE)) == len(jax.tree.leaves(params))
