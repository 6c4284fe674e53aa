"""Config files are read strictly: what is unknown, missing or of another type is named, with what would be right."""

import copy

import pytest
import tiny

from dreamlite_jax.config import ModelConfig, SchedulerConfig, UNetConfig, VAEConfig, from_dict, to_dict
from dreamlite_jax.errors import UserError
from dreamlite_jax.training.config import PrecomputeConfig, SourceConfig, TrainConfig, load_config


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
        ("model.vae.latent_channels=5", "unet.out_channels is 4 but vae.latent_channels is 5"),
        ("steps=0", "config.steps is 0; it must be at least 1"),
        ("grid_items=0", "config.grid_items is 0"),
        ("data.batch_size=0", "config.data.batch_size is 0"),
        ("data.sources=()", "config.data.sources is empty"),
        ("data.sources.0.weight=0", r"config.data.sources\[0\].weight is 0"),
        ("flow.text_drop=10", "config.flow.text_drop is 10.0; it must be at least 0 and at most 1"),
        ("model.unet.norm_groups=0", "unet.norm_groups is 0; it must be at least 1"),
        ("model.unet.num_heads=(0,)", r"unet.num_heads is \(0,\); it must be at least 1"),
        ("model.unet.block_out_channels=()", "unet.block_out_channels is empty"),
        ("model.vae.decoder_blocks=(0,)", "vae.encoder_blocks has 3 entries and decoder_blocks 1"),
        ("model.scheduler.max_seq_len=256", "scheduler.max_seq_len is 256; it must be above 256"),
        ("model.steps=0", "model.steps is 0; it must be at least 1"),
        ("model.guidance_scale=-1", "model.guidance_scale is -1.0; it must be at least 0"),
        ("seed=-1", "config.seed is -1; it must be at least 0 and at most 4294967295"),
        ("data.processes=-1", "config.data.processes is -1; it must be at least 0"),
        ("data.threads=-1", "config.data.threads is -1"),
        ("data.buckets.max_ratio=1e400", "config.buckets.max_ratio is inf; it must be finite"),
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
