"""Config files are read strictly: what is unknown, missing or of another type is named, with what would be right."""

import copy
import dataclasses

import pytest
import tiny

from dreamlite_jax.config import ModelConfig, SchedulerConfig, UNetConfig, VAEConfig, differences, from_dict, to_dict
from dreamlite_jax.data.config import SourceConfig
from dreamlite_jax.errors import UserError
from dreamlite_jax.training.config import PrecomputeConfig, TrainConfig, load_config


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    root = tmp_path_factory.mktemp("config")
    return str(tiny.write_config(root / "config.py", tiny.train_config(root)))


def test_a_config_goes_to_a_dict_and_back(file):
    config = load_config(file)
    assert config.model == tiny.CONFIG and config.steps == 12 and config.optim.b1 == 0.9
    assert isinstance(config.data.sources[1], SourceConfig)
    assert from_dict(TrainConfig, to_dict(config)) == config


def test_overrides_reach_every_kind_of_field(file):
    overrides = (
        "steps=99",
        "optim.learning_rate=3e-4",
        "optim.decay=cosine",  # a default of the file
        "mesh.fsdp=2",  # a section the file leaves out
        "model.unet.num_kv_heads=None",
        "model.scheduler.max_shift=1",  # an integer where a float is meant
        "data.sources.0.path=/elsewhere",
        "data.sources.1.weight=2.5",  # a default of an entry
        "model.unet.block_out_channels=(24,)",
        "remat=True",
    )
    config = load_config(file, overrides)
    assert (config.steps, config.optim.learning_rate, config.optim.decay, config.mesh.fsdp) == (99, 3e-4, "cosine", 2)
    assert config.model.unet.num_kv_heads is None and config.model.unet.block_out_channels == (24,)
    assert config.model.scheduler.max_shift == 1.0 and isinstance(config.model.scheduler.max_shift, float)
    assert config.data.sources[0].path == "/elsewhere" and config.data.sources[1].weight == 2.5 and config.remat is True
    assert load_config(file).steps == 12  # the file itself is as it was


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("stepz=3", "config.stepz is not a known field; did you mean 'steps'"),
        ("optim.lerning_rate=1", "config.optim.lerning_rate .* did you mean 'learning_rate'"),
        ("optim.deacy=1", "config.optim.deacy .* did you mean 'decay'"),  # near a field that the file leaves out
        ("model.unet.heads=3", "config.model.unet.heads is not a known field"),
        ("steps.x=3", "config.steps.x is not a known field; config.steps has no fields"),
        ("data.sources.7.path=x", "config.data.sources.7.path .* known are: 0, 1"),
        ("data.sources.0=x", "override a field of an entry"),
        ("steps", "written --config.steps=VALUE"),
        ("steps=many", "config.steps is 'many' .*must be int"),
        ("steps=1.5", "config.steps is 1.5 .*must be int"),
        ("steps=True", "config.steps is True .*must be int"),
        ("remat=1", "config.remat is 1 .*must be bool"),
        ("vae=3", "config.vae is 3 .*must be str"),
        ("optim.decay=exponential", "config.optim.decay is 'exponential'; it must be one of 'constant', 'cosine'"),
        ("stage=gan", "config.stage is 'gan'; it must be one of 'flow_matching', 'vae'"),
        ("model=3", "config.model is 3"),
        ("model.unet.block_out_channels=(8, 'x')", r"block_out_channels\[1\] is 'x'"),
        ("model.unet.block_out_channels=(18,)", "18 is not a multiple of norm_groups 4"),
        ("model.unet.in_channels=8", "in_channels is 8; .*needs 4"),
        ("model.unet.num_heads=(2, 2)", "num_heads has 2 entries; block_out_channels has 1"),
        ("model.vae.latent_channels=5", "config.model.unet.out_channels is 4 but vae.latent_channels is 5"),
        ("steps=0", "config.steps is 0; it must be at least 1"),
        ("grid_items=0", "config.grid_items is 0"),
        ("data.buckets.size=100", "config.data.buckets.size is 100; it must be a multiple of the buckets' multiple 32"),
        ("model.native_size=18", "config.model.native_size is 18; .* multiples of 4, such as 16"),
        ("data.batch_size=0", "config.data.batch_size is 0"),
        ("data.sources=()", "config.data.sources is empty"),
        ("data.sources.0.weight=0", r"config.data.sources\[0\].weight is 0"),
        ("flow.text_drop=10", "config.flow.text_drop is 10.0; it must be at least 0 and at most 1"),
        ("model.unet.norm_groups=0", "config.model.unet.norm_groups is 0; it must be at least 1"),
        ("model.unet.num_heads=(0,)", r"config.model.unet.num_heads is \(0,\); it must be at least 1"),
        ("model.unet.block_out_channels=()", "config.model.unet.block_out_channels is empty"),
        ("model.vae.decoder_blocks=(0,)", "config.model.vae.encoder_blocks has 3 entries and decoder_blocks 1"),
        ("model.scheduler.max_seq_len=256", "config.model.scheduler.max_seq_len is 256; it must be above 256"),
        ("model.steps=0", "config.model.steps is 0; it must be at least 1"),
        ("model.guidance_scale=-1", "config.model.guidance_scale is -1.0; it must be at least 0"),
        ("seed=-1", "config.seed is -1; it must be at least 0 and at most 4294967295"),
        ("data.processes=-1", "config.data.processes is -1; it must be at least 0"),
        ("data.threads=-1", "config.data.threads is -1"),
        ("data.buckets.max_ratio=1e400", "config.data.buckets.max_ratio is inf; it must be finite"),
        ("optim.clip_norm=0", "config.optim.clip_norm is 0.0; it must be above 0"),
        ("optim.ema_decay=7", "config.optim.ema_decay is 7.0; it must be at least 0 and below 1"),
        ("optim.learning_rate=-1", "config.optim.learning_rate is -1.0; it must be above 0"),
        ("optim.learning_rate=1e400", "config.optim.learning_rate is inf; it must be finite"),
        ("optim.warmup_steps=-5", "config.optim.warmup_steps is -5; it must be at least 0"),
        ("dmd.fake.b2=1", "config.dmd.fake.b2 is 1.0; it must be at least 0 and below 1"),
    ],
)
def test_bad_overrides_are_named(file, override, says):
    with pytest.raises(UserError, match=says):
        load_config(file, [override])


def test_a_refused_value_is_named_by_its_place_however_deep(file):
    with pytest.raises(UserError, match=r"^config\.refl\.rewards\[1\]\.prompt_tokens is 0"):
        rewards = [{"kind": "target"}, {"kind": "target", "prompt_tokens": 0}]
        load_config(file, ["stage=refl", f"refl={{'rewards': {rewards}}}"])
    with pytest.raises(UserError, match=r"^there: config\.unet\.num_heads has 2 entries"):
        from_dict(ModelConfig, {"unet": {"num_heads": (1, 1), "down_blocks": ("plain",) * 3}}, "there: config")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["stage=dmd2", "refl.reward_weight=0.3"], "reward_weight is 0.3, but stage dmd2 .*; stage refl does"),
        (["dmd.teacher=x"], "config.dmd.teacher is 'x', but stage flow_matching does not read it"),
        (["dmd.fake.b1=0.5"], "config.dmd.fake.learning_rate is 0.0001, but stage flow_matching"),
        (["stage=dmd2", "dmd.fake.ema_decay=0.5"], "config.dmd.fake.ema_decay is 0.5, but nothing reads it"),
        (["stage=dmd2", "flow.text_drop=0.5"], "config.flow.text_drop is 0.5, .* stage flow_matching, refl do"),
        (["autoencoder.hard_power=1"], "config.autoencoder.hard_power is 1.0, but stage flow_matching"),
        (["stage=vae"], "config.vae is '.*vae.safetensors', but stage vae does not read it"),
        (["stage=vae", "vae=", "dtype=bfloat16"], "config.dtype is 'bfloat16', but stage vae"),
        (["remat_keep=matmuls"], "config.remat_keep is 'matmuls', but only remat=True reads it"),
        (["optim.final_fraction=0.1"], "config.optim.final_fraction is 0.1, but a constant decay does not read it"),
        (["data.processes=2"], "config.data.processes is 2, but precomputed latents are read by data.threads"),
        (["data.sources.1.changed_levels=3"], r"sources\[1\].changed_levels is 3, but a source of kind latents"),
        (["data.sources.0.kind=folder", "data.sources.0.split=x"], r"sources\[0\].split is 'x', but .* kind folder"),
        (["data.sources.0.fields={'image': 'jpg'}"], r"config.data.sources\[0\].fields.image is 'jpg'"),
        (["data.validation=[{'path': 'x', 'weight': 2}]"], r"config.data.validation\[0\].weight is 2.0, but"),
        (["model.text.source=elsewhere"], "config.model.text.source is 'elsewhere', but the encoder minilm comes from"),
    ],
)  # fmt: skip
def test_a_setting_that_nothing_would_read_is_refused(file, overrides, says):
    with pytest.raises(UserError, match=says):
        load_config(file, overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.decay=linear", "optim.final_fraction=0.1"],
        ["remat=True", "remat_keep=matmuls"],
        ["stage=refl", "refl.reward_weight=0.3", "flow.text_drop=0.5"],
        ["stage=dmd2", "dmd.fake.b1=0.5", "flow.region_weight=False"],
        ["data.encode=on_device", "data.processes=2"],
        ["data.sources.0.name=t2i_64", "data.sources.0.split=heldout"],
        ["model.text={'encoder': 'qwen3_vl', 'source': 'elsewhere'}"],
        ["stage=refl", "refl.push=below", "grid_steps=2"],  # its default, written out
    ],
)
def test_a_setting_that_is_read_is_taken(file, overrides):
    load_config(file, overrides)


CONFIGS = {
    "quickstart": ("t2i", "edit", "joint"),
    "quickstart_post": ("sft", "refl", "dmd2"),
    "demo": ("t2i", "edit", "joint", "sft", "refl", "dmd2", "vae"),
    "vae": ("data",),
    "dreamlite": ("t2i_256", "t2i_512", "t2i_1024", "edit", "joint", "sft"),
    "dreamlite_post": ("refl", "dmd2"),
}


@pytest.mark.parametrize(
    "location", [f"{name}:{argument}" for name, arguments in CONFIGS.items() for argument in arguments]
)
def test_every_shipped_config_loads(location):
    config = load_config(f"configs/{location.replace(':', '.py:')}")
    assert from_dict(TrainConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    "location", ["precompute.py:edit_64", "precompute.py:folder,x", "precompute.py:array_record,x,train",
                 "precompute.py:tfds,x,y", "dreamlite_latents.py:t2i_256", "dreamlite_latents.py:edit_512_square"],
)  # fmt: skip
def test_every_shipped_config_of_precompute_loads(location):
    load_config(f"configs/{location}", (), PrecomputeConfig)
    with pytest.raises(UserError, match=r"config.source.weight is 2.0, but one source has no mixture"):
        load_config(f"configs/{location}", ["source.weight=2"], PrecomputeConfig)


def test_configs_that_differ_are_told_by_their_fields():
    other = dataclasses.replace(UNetConfig(), ff_mult=4, num_heads=(2, 8, 14))
    assert [str(found) for found in differences(UNetConfig(), other, "unet")] == [
        "unet.num_heads is [2, 8, 14], and [4, 8, 14] there", "unet.ff_mult is 4, and 3 there"
    ]  # fmt: skip
    one, two = {"s": [{"a": 1}, {"a": 2}]}, {"s": [{"a": 1}, {"a": 3, "b": 0}]}
    assert differences(one, two, "") == [("s[1].a", 2, 3), ("s[1].b", None, 0)]
    assert not differences(one, one, "x") and differences([1], [1, 2], "x") == [("x", [1], [1, 2])]


def test_a_missing_field_and_an_unknown_one_in_the_file_are_named(tmp_path):
    mapping = tiny.train_config(tmp_path)
    without, strange = copy.deepcopy(mapping), copy.deepcopy(mapping)
    del without["data"]["batch_size"]
    strange["model"]["unet"]["lyers_per_block"] = 2
    with pytest.raises(UserError, match=r"config.data.batch_size is missing; it needs a value of type int"):
        load_config(str(tiny.write_config(tmp_path / "a.py", without)))
    with pytest.raises(UserError, match=r"config.model.unet.lyers_per_block .* did you mean 'layers_per_block'"):
        load_config(str(tiny.write_config(tmp_path / "b.py", strange)))


def test_bad_files_and_arguments_are_named(tmp_path, file):
    with pytest.raises(UserError, match=r"nowhere.py: no such file"):
        load_config("nowhere.py:t2i")
    with pytest.raises(UserError, match=r"README.md: not a Python file"):
        load_config("README.md")
    with pytest.raises(UserError, match=r"takes no argument"):
        load_config(f"{file}:t2i")
    (tmp_path / "empty.py").write_text("steps = 3\n")
    with pytest.raises(UserError, match=r"defines no get_config"):
        load_config(str(tmp_path / "empty.py"))
    (tmp_path / "choice.py").write_text("def get_config(size='s'):\n    return {'s': {}}[size]\n")
    with pytest.raises(UserError, match=r"choice.py:xl"):
        load_config(f"{tmp_path}/choice.py:xl")
    with pytest.raises(UserError, match=r"stage 'tti' is not one of t2i"):
        load_config("configs/quickstart.py:tti")


def test_precompute_configs_are_as_strict():
    config = load_config("configs/precompute.py:edit_64", ["source.split=heldout", "shard_size=7"], PrecomputeConfig)
    assert (config.source.name, config.source.split, config.shard_size) == ("edit_64", "heldout", 7)
    with pytest.raises(UserError, match=r"config.source.splitt .* did you mean 'split'"):
        load_config("configs/precompute.py", ["source.splitt=train"], PrecomputeConfig)
    with pytest.raises(UserError, match=r"config.shard_size is 0"):
        load_config("configs/precompute.py", ["shard_size=0"], PrecomputeConfig)
    with pytest.raises(UserError, match=r"config.steps is not a known field"):
        load_config("configs/precompute.py", ["steps=3"], PrecomputeConfig)


def test_the_defaults_are_the_released_model():
    config = ModelConfig()
    assert config.unet == UNetConfig() and config.vae == VAEConfig() and config.scheduler == SchedulerConfig()
    assert config.unet.block_out_channels == (256, 512, 896) and config.unet.text_dim == 2048
    assert config.size_multiple == 32 and config.vae.downsampling == 8
