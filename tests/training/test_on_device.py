"""Training from raw pictures: what the device encodes is what `precompute` writes, and a run works from end to end."""

import contextlib
import json

import jax
import numpy as np
import pytest
import raw_sets
import tiny
from PIL import Image

from dreamlite_jax import precompute, train
from dreamlite_jax.config import from_dict
from dreamlite_jax.data import latents
from dreamlite_jax.errors import UserError
from dreamlite_jax.training.build import build
from dreamlite_jax.training.config import TrainConfig

BUCKETS = {"size": 16, "multiple": 16}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Four texts and four edits of 16 px, a model to start from, and what precompute makes of them."""
    folder = tmp_path_factory.mktemp("on_device")
    tiny.write_vae(folder / "vae.safetensors")
    tiny.write_model(folder / "first")
    rng, rows = np.random.default_rng(0), []
    (folder / "raw").mkdir()
    for i in range(8):
        picture = rng.integers(0, 255, (16, 16, 3), np.uint8)
        (folder / "raw" / f"s{i}.png").write_bytes(raw_sets.encoded(Image.fromarray(picture)))
        picture[:8] = 255 - picture[:8]
        (folder / "raw" / f"t{i}.png").write_bytes(raw_sets.encoded(Image.fromarray(picture)))
        generate = {"image": f"t{i}.png", "caption": f"number {i}"}
        edit = {"source": f"s{i}.png", "instruction": f"number {i}", "target": f"t{i}.png"}
        rows.append(edit if i % 2 else generate)
    raw_sets.write_rows(folder / "raw", rows)
    return folder


def mapping(root, **data):
    changed = tiny.train_config(root, steps=2, flow={"text_drop": 0.5})
    source = {"path": str(root / "raw"), "kind": "folder"}
    defaults = {"batch_size": 8, "text_length": 40, "encode": "on_device", "buckets": BUCKETS, "sources": [source]}
    return changed | {"data": defaults | data}


def autoencoder_config(root, **changes):
    """Of stage vae, on the same pictures."""
    given = mapping(root, text_length=64)
    read = ("model", "data", "optim", "steps", "log_every", "checkpoint_every", "grid_every", "grid_items")
    return from_dict(TrainConfig, {name: given[name] for name in read} | {"stage": "vae"} | changes, "config")


def run(root, **data):
    return build(from_dict(TrainConfig, mapping(root, **data), "config"))


def test_the_device_encodes_what_precompute_writes_and_the_loss_is_the_same(root):
    settings = {"source.kind": "folder", "source.path": root / "raw", "source.name": "''", "buckets.size": 16}
    settings |= {"vae": root / "vae.safetensors", "buckets.multiple": 16, "batch_size": 8}
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    precompute.main(["--config", "configs/precompute.py", "--output", str(root / "latents"), *overrides])
    before = run(root, encode="precomputed", sources=[{"path": str(root / "latents")}])
    rows = {}
    for example in map(latents.unpack, latents.open_examples(root / "latents")):
        rows[example.text] = latents.collate(example, 40)

    here = run(root)
    raw = next(iter(here.feed.dataset(here.stage.fields)))
    found = jax.device_get(jax.jit(here.stage.codec.encoded)(raw))
    sums = {text: row["text"].sum() for text, row in rows.items()}
    texts = [min(sums, key=lambda text: abs(sums[text] - states.sum())) for states in found["text"]]
    assert sorted(texts) == sorted(f"number {i}" for i in range(8))
    expected = {key: np.stack([rows[text][key] for text in texts]) for key in rows["number 0"]}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=2e-3, atol=2e-3, err_msg=key)
    assert found["editing"].sum() == 4 and not found["source"][found["editing"] == 0].any()

    params, key = tiny.unet_params(), jax.random.key(1)
    loss = jax.jit(here.stage.loss)
    np.testing.assert_allclose(loss(params, found, key)[0], loss(params, expected, key)[0], rtol=2e-3)
    np.testing.assert_allclose(here.feed.null_prompt.states, before.feed.null_prompt.states, rtol=1e-5)


@pytest.mark.slow
def test_a_run_trains_from_pictures_names_the_bad_ones(root, tmp_path):
    (root / "raw" / "torn.png").write_bytes(b"torn")
    rows = [json.loads(line) for line in (root / "raw" / "metadata.jsonl").read_text().splitlines()]
    raw_sets.write_rows(root / "raw", [*rows, {"image": "torn.png", "caption": "number 9"}])
    data = mapping(root, max_bad_fraction=0.5)
    config, workdir = tiny.write_config(tmp_path / "config.py", data), tmp_path / "work"
    arguments = ["--config", str(config), "--workdir", str(workdir)]
    try:
        assert train.main(arguments) == 0
    finally:
        raw_sets.write_rows(root / "raw", rows)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2] and lines[0]["mse_edit"] > 0 < lines[0]["mse_generate"]
    assert (workdir / "model" / "model.json").is_file() and list((workdir / "grids").iterdir())
    (bad,) = [json.loads(line) for line in (workdir / "bad_records" / "host_0.jsonl").read_text().splitlines()]
    assert bad["record"] == "metadata.jsonl line 9" and "picture cannot be used" in bad["reason"]
    assert train.main(arguments) == 0  # complete; and its own log does not make the workdir a stranger's


def test_sources_that_do_not_suit_are_refused(root):
    with pytest.raises(UserError, match=r"is of kind folder; config.data.encode=on_device reads raw pictures"):
        run(root, encode="precomputed")
    latents_as_raw = run(root, sources=[{"path": str(root / "raw")}])
    with pytest.raises(UserError, match="has kind latents; raw pictures come from"):
        latents_as_raw.feed.dataset(latents_as_raw.stage.fields)
    with pytest.raises(UserError, match=r"config.data.encode is 'on_device'; stage refl needs 'precomputed'"):
        from_dict(TrainConfig, mapping(root) | {"stage": "refl"}, "config")


def test_sizes_that_the_network_cannot_take_are_refused_before_anything_runs(root):
    """A side of a latent pixel is 4 px; four levels need latents whose sides are multiples of 8."""
    odd = {"size": 16, "multiple": 2, "max_ratio": 2.0}
    with pytest.raises(UserError, match=r"config.data.buckets gives pictures of 22x12; the U-Net needs multiples of 4"):
        run(root, buckets=odd)
    for buckets, refused in ((odd, True), (BUCKETS, False)):
        config = autoencoder_config(root, data=mapping(root, buckets=buckets, text_length=64)["data"])
        with pytest.raises(UserError, match="the autoencoder needs") if refused else contextlib.nullcontext():
            build(config)

    tiny.write_latents(root / "squares", "generate", 4)
    data = {"encode": "precomputed", "sources": [{"path": str(root / "squares")}]}
    deeper = mapping(root, **data)
    levels = {"block_out_channels": (8,) * 4, "num_heads": (2,) * 4, "transformer_layers": (1,) * 4}
    levels |= {"down_blocks": ("plain",) * 4, "up_blocks": ("plain",) * 4}
    deeper["model"] = {**deeper["model"], "unet": {**deeper["model"]["unet"], **levels}, "native_size": 32}
    with pytest.raises(UserError, match=r"squares gives pictures of 16x16; the U-Net needs multiples of 32 pixels"):
        build(from_dict(TrainConfig, deeper, "config"))
    run(root, **data)
    info = latents.read_info(root / "squares") | {"buckets": [[16, 16], [22, 12]]}
    (root / "squares" / "info.json").write_text(json.dumps(info))
    np.save(root / "squares" / latents.BUCKETS, np.zeros(4, np.uint16))
    with pytest.raises(UserError, match=r"squares gives pictures of 22x12; the U-Net needs multiples of 4 pixels"):
        run(root, **data)


def test_the_autoencoder_learns_from_any_pictures(root, caplog):
    stage, feed, gallery = build(autoencoder_config(root))
    batch = next(iter(feed.dataset(stage.fields)))
    assert batch["image"].shape == (8, 16, 16, 3) and -1 <= batch["image"].min() < batch["image"].max() <= 1
    picture = gallery.grid(tiny.vae_params())
    with jax.log_compiles():
        assert not np.array_equal(gallery.grid(tiny.vae_params(seed=1)), picture)
    assert "Compiling" not in caplog.text


def test_pictures_count_by_the_power_of_their_error(root):
    """One picture that is hard and one that is easy: with the power the loss is nearer to the hard one's."""
    losses = {}
    for power in (0.0, 2.0):
        weights = {"latent_noise": 0.0, "latent_weight": 0.0, "squared_weight": 0.0, "hard_power": power}
        stage = build(autoencoder_config(root, autoencoder=weights)).stage
        params, key = tiny.vae_params(), jax.random.key(0)
        near = stage.network.apply({"params": params}, np.zeros((1, 16, 16, 3), np.float32))
        images = np.concatenate([near, near + 5.0])
        losses[power] = float(stage.loss(params, {"image": images}, key)[0])
        alone = [float(stage.loss(params, {"image": image[None]}, key)[0]) for image in images]
    mean, squares = np.mean(alone), np.mean(np.square(alone))
    assert losses[0.0] == pytest.approx(mean, rel=1e-5)
    assert losses[2.0] == pytest.approx(np.mean(np.power(alone, 3)) / squares, rel=1e-5)
    assert losses[2.0] > 1.01 * losses[0.0]
