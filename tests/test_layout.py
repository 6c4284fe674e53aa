"""The house in order: every config builds and its step has shapes, every command helps, training needs no torch."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny

from dreamlite_jax.assets import SPRITES_VAE
from dreamlite_jax.config import UNetConfig, VAEConfig, to_dict
from dreamlite_jax.data import latents
from dreamlite_jax.data.sprites import builder
from dreamlite_jax.errors import UserError
from dreamlite_jax.model_folder import load_vae, vae_manifest
from dreamlite_jax.training import loop
from dreamlite_jax.training.build import build
from dreamlite_jax.training.config import PrecomputeConfig, TrainConfig, load_config, read_config_file
from dreamlite_jax.training.stages import dmd2

REPOSITORY = Path(__file__).parents[1]
TRAINING = {
    "quickstart.py": ("t2i", "edit", "joint"),
    "quickstart_post.py": ("sft", "refl", "dmd2"),
    "demo.py": ("t2i", "edit", "joint", "sft", "refl", "dmd2", "vae"),
    "vae.py": ("",),
}
FULL_SIZE = {
    "dreamlite.py": ("t2i_256", "joint", "t2i_512", "t2i_1024", "edit", "sft"),
    "dreamlite_post.py": ("refl", "dmd2"),
    "ladder.py": ("sdxl", "no_self_attention", "channel_concat"),
}
QUICK = ("joint",)  # the other stages trace the same network on other shapes
RECIPE = ("t2i_256", "t2i_512", "t2i_1024", "edit", "joint", "sft")
PRECOMPUTE = {
    "precompute.py": ("", "t2i_64", "edit_64", "edit_128"),
    "dreamlite_latents.py": ("", "t2i_256", "edit_1024", "sft_edit_1024", "t2i_512_square"),
}


def write(directory: Path, vae: VAEConfig, task: str, states: np.ndarray) -> None:
    """A complete folder of three equal records of 64 px."""
    directory.mkdir(parents=True)
    picture = np.zeros((64 // vae.downsampling, 64 // vae.downsampling, vae.latent_channels))
    source = picture if task == "edit" else None
    items = [latents.Example(f"{task}_{i}", task, "x", picture, source, None, states, (64, 64)) for i in range(3)]
    latents.write_shard(latents.shard_path(directory, 0, 1), iter(items))
    latents.write_info(directory, {"shards": 1, "vae": to_dict(vae)}, states[:2])


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """What the configs read, with few and synthetic records."""
    folder = tmp_path_factory.mktemp("layout")
    demo = load_config(f"{REPOSITORY}/configs/demo.py:vae").model.vae
    tiny.write_vae(folder / "demo" / "vae" / "model" / "vae.safetensors", demo)
    (folder / "demo" / "data").symlink_to(folder)
    for task in builder.TASKS:
        builder.prepare(folder, task, 64, {"train": 8, "validation": 8, "heldout": 8})
    for name in ("t2i", "edit", "t2i_validation", "edit_validation"):
        task = "edit" if name.startswith("edit") else "generate"
        for place, vae in ((folder, load_vae(SPRITES_VAE)[0]), (folder / "demo", demo)):
            write(place / "latents" / name, vae, task, np.zeros((9, tiny.TEXT_DIM)))
    return folder


def test_every_config_is_known_here():
    assert {path.name for path in (REPOSITORY / "configs").glob("*.py")} == {*TRAINING, *PRECOMPUTE, *FULL_SIZE}


def small(root: Path, file: str, argument: str) -> TrainConfig:
    """A config of the laptop's, to start from random weights."""
    root = root / "demo" if file == "demo.py" else root
    location = f"{REPOSITORY}/configs/{file}:" + (f"{argument},{root}" if argument else str(root))
    written = read_config_file(location)
    config = load_config(location, ["init_from=''"])
    assert config.steps == written["steps"] and config.stage == written["stage"]
    return config


@pytest.mark.parametrize(("file", "argument"), [(file, a) for file, args in TRAINING.items() for a in args])
def test_training_configs_build_and_find_their_data(root, file, argument):
    config = small(root, file, argument)
    stage, feed = build(config)[:2]
    batch = next(iter(feed.dataset(stage.fields)))
    assert {len(value) for value in batch.values()} == {config.data.batch_size}
    assert loop.count(stage.state_shapes().params) > 1e5


# The demo's stages trace what the quick start's do, and so does every stage of flow matching but for its batch.
TRACED = {("quickstart.py", "joint"), ("quickstart_post.py", "refl"), ("quickstart_post.py", "dmd2"), ("vae.py", "")}


@pytest.mark.parametrize(
    ("file", "argument"),
    [
        pytest.param(file, argument, marks=() if (file, argument) in TRACED else pytest.mark.slow)
        for file, arguments in TRAINING.items()
        for argument in arguments
    ],
)
def test_steps_of_training_configs_have_shapes(root, file, argument, monkeypatch):
    config = small(root, file, argument)
    if config.stage == "dmd2":
        with pytest.raises(UserError, match="distillation needs a trained teacher"):
            loop.check(config, *build(config)[:2])
        monkeypatch.setattr(dmd2.Teacher, "check", lambda _: None)  # its shapes are all that is asked for here
    report = "\n".join(loop.check(config, *build(config)[:2]))
    assert f"batch {config.data.batch_size}" in report and "grad_norm" in report


@pytest.mark.parametrize("file", FULL_SIZE)
def test_full_size_configs_build(file):
    """Every argument; what they say of another root is where they look."""
    for argument in FULL_SIZE[file]:
        config = load_config(f"{REPOSITORY}/configs/{file}:{argument}")
        stage, feed, _ = build(config, shapes_only=True)
        feed.batch(stage.fields)
    with pytest.raises(UserError, match="is not one of"):
        load_config(f"{REPOSITORY}/configs/{file}:nonsense")


@pytest.mark.parametrize(
    ("file", "argument"),
    [
        pytest.param(file, argument, marks=() if argument in QUICK else pytest.mark.slow)
        for file, arguments in FULL_SIZE.items()
        for argument in arguments
    ],
)
def test_steps_of_the_full_size_have_shapes(file, argument):
    """Neither data nor the autoencoder is here: shapes come from the config."""
    config = load_config(f"{REPOSITORY}/configs/{file}:{argument}")
    stage, feed, _ = build(config, shapes_only=True)
    batch, state = feed.batch(stage.fields), stage.state_shapes()
    new, metrics = jax.eval_shape(stage.step, state, batch)
    assert (argument in ("sdxl", "no_self_attention")) or abs(loop.count(state.params) - 389_968_388) < 1e4
    assert jax.tree.map(np.shape, new) == jax.tree.map(np.shape, state) and metrics["loss"].shape == ()
    panel = config.data.buckets.size or config.model.native_size
    assert batch["target"].shape[1:] == (panel // 8, panel // 8, 4)


def test_the_recipe_says_what_the_spec_says():
    """Stages in order, each from the one before; 1:1 mixture; the weight of changed regions; independent drops."""
    configs = {stage: load_config(f"{REPOSITORY}/configs/dreamlite.py:{stage},ROOT") for stage in RECIPE}
    for before, (stage, config) in zip(["", *list(RECIPE)[:-1]], configs.items(), strict=True):
        assert config.init_from == (f"ROOT/runs/{before}" if before else "")
        assert config.model.unet == UNetConfig() and config.model.vae == VAEConfig()
        assert 1e-4 <= config.optim.learning_rate <= 2e-4 or stage == "sft"
        assert config.flow.region_weight and config.flow.text_drop > 0 and config.flow.image_drop > 0
        assert config.data.buckets.max_ratio > 1
    assert [config.data.buckets.size for config in configs.values()] == [256, 512, 1024, 1024, 1024, 1024]
    joint = configs["joint"].data
    assert [(s.path, s.weight) for s in joint.sources] == [
        ("ROOT/latents/t2i_1024", 1.0),
        ("ROOT/latents/edit_1024", 1.0),
    ]


def test_latents_of_the_recipe_are_those_that_it_reads():
    """What configs/dreamlite_latents.py makes has the buckets and the autoencoder that each stage expects."""
    stages = [f"dreamlite.py:{stage}" for stage in RECIPE] + ["dreamlite_post.py:refl", "dreamlite_post.py:dmd2"]
    for stage in stages:
        config = load_config(f"{REPOSITORY}/configs/{stage},ROOT")
        for source in config.data.sources:
            name = Path(source.path).name
            made = load_config(f"{REPOSITORY}/configs/dreamlite_latents.py:{name},ROOT", cls=PrecomputeConfig)
            assert (made.buckets, made.vae) == (config.data.buckets, config.vae)
            assert made.text.max_length >= config.data.text_length


@pytest.mark.parametrize(("file", "argument"), [(file, a) for file, args in PRECOMPUTE.items() for a in args])
def test_precompute_configs_build(file, argument):
    location = f"{REPOSITORY}/configs/{file}" + (f":{argument}" if argument else "")
    config = load_config(location, cls=PrecomputeConfig)
    sprites = {c.name for c in builder.Sprites.BUILDER_CONFIGS}
    assert config.source.name in sprites if config.source.form == "sprites" else config.source.kind == "array_record"


def test_the_shipped_autoencoder_is_the_one_its_config_makes():
    config = load_config(f"{REPOSITORY}/configs/vae.py")
    assert load_vae(SPRITES_VAE)[0] == config.model.vae
    assert SPRITES_VAE.stat().st_size < 5e6
    sources = vae_manifest(SPRITES_VAE)["provenance"]["config"]["data"]["sources"]
    assert not any(Path(source["path"]).is_absolute() for source in sources)  # no machine's own folders


def modules(package: str) -> list[str]:
    paths = (path.relative_to(REPOSITORY) for path in (REPOSITORY / package).rglob("*.py"))
    return sorted(".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths)


def test_nothing_in_the_package_imports_torch_or_tensorflow():
    code = f"""
import importlib, sys
for name in {modules("dreamlite_jax")}:
    importlib.import_module(name)
print(*[name for name in ("torch", "tensorflow", "diffusers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_conversion_is_imported_by_the_package_in_one_place_only():
    """Arrows point one way, but for reading a released folder as it is, which loads conversion when it is asked to."""
    uses = r"^\s*(from|import) (dreamlite_jax\.)?conversion|import_module\(.*package|\"conversion\""
    found = {
        path.relative_to(REPOSITORY).as_posix()
        for path in (REPOSITORY / "dreamlite_jax").rglob("*.py")
        if re.search(uses, path.read_text(), re.M)
    }
    assert found == {"dreamlite_jax/released.py"}


def commands() -> list[str]:
    """Modules that run as `python -m`."""
    names = [*modules("dreamlite_jax"), *modules("conversion")]
    files = {name: REPOSITORY / (name.replace(".", "/") + ".py") for name in names}
    return [name for name, path in files.items() if path.is_file() and '__name__ == "__main__"' in path.read_text()]


@pytest.mark.parametrize("command", commands())
def test_every_command_helps(command, capsys):
    with pytest.raises(SystemExit) as exit_:
        importlib.import_module(command).main(["--help"])
    said = capsys.readouterr().out
    assert exit_.value.code == 0 and said.startswith(f"usage: python -m {command.removesuffix('.__main__')}")


def test_there_are_commands():
    for name in ("train", "sample", "precompute", "evaluate", "data.sprites.__main__"):
        assert f"dreamlite_jax.{name}" in commands()


def test_every_package_is_installed():
    """setup.cfg lists the packages by hand; a new folder must not be forgotten."""
    listed = re.search(r"^packages =\n((?:    .+\n)+)", (REPOSITORY / "setup.cfg").read_text(), re.M).group(1).split()
    found = {path.parent.relative_to(REPOSITORY) for path in (REPOSITORY / "dreamlite_jax").rglob("*.py")}
    beside = {
        "dreamlite_jax.conversion",
        "dreamlite_jax.configs",
    }  # folders of the repository, installed inside the package
    assert {".".join(path.parts) for path in found} | beside == set(listed)
