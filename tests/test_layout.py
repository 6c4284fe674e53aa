"""The house in order: every config builds and its step has shapes, every command helps, training needs no torch."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from dreamlite_jax.assets import SPRITES_VAE
from dreamlite_jax.config import VAEConfig, to_dict
from dreamlite_jax.data import latents
from dreamlite_jax.data.sprites import builder
from dreamlite_jax.model_folder import load_vae, save_vae, vae_manifest
from dreamlite_jax.models.vae import VAE
from dreamlite_jax.train import build_stage
from dreamlite_jax.training import loop
from dreamlite_jax.training.config import PrecomputeConfig, load_config, read_config_file

REPOSITORY = Path(__file__).parents[1]
TRAINING = {"quickstart.py": ("t2i", "edit", "joint"), "vae.py": ("",)}
PRECOMPUTE = {"precompute.py": ("", "t2i_64", "edit_64", "edit_128")}


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
    for task in builder.TASKS:
        builder.prepare(folder, task, 64, {"train": 8, "validation": 8, "heldout": 8})
    for name in ("t2i", "edit", "t2i_validation", "edit_validation"):
        task = "edit" if name.startswith("edit") else "generate"
        write(folder / "latents" / name, load_vae(SPRITES_VAE)[0], task, np.zeros((9, tiny.TEXT_DIM)))
    return folder


def test_every_config_is_known_here():
    assert {path.name for path in (REPOSITORY / "configs").glob("*.py")} == {*TRAINING, *PRECOMPUTE, "ladder.py"}


@pytest.mark.parametrize(("file", "argument"), [(file, a) for file, args in TRAINING.items() for a in args])
def test_training_configs_build_and_their_steps_have_shapes(root, file, argument):
    location = f"{REPOSITORY}/configs/{file}:" + (f"{argument},{root}" if argument else str(root))
    written = read_config_file(location)
    config = load_config(location, ["init_from=''"])
    assert config.steps == written["steps"] and config.stage == written["stage"]
    report = "\n".join(loop.check(config, build_stage(config)))
    assert f"batch {config.data.batch_size}" in report and "grad_norm" in report


@pytest.mark.parametrize(
    "rung", ["mqa", *(pytest.param(r, marks=pytest.mark.slow) for r in ("sdxl", "no_self_attention", "channel_concat"))]
)
def test_steps_of_the_full_size_have_shapes(tmp_path, rung):
    """One panel of 64 px; the number of pixels plays no part in whether the step can be built."""
    location = f"{REPOSITORY}/configs/ladder.py:{rung}"
    config = load_config(location, [f"vae={tmp_path}/vae", f"data.sources.0.path={tmp_path}/set", "data.batch_size=2"])
    shapes = jax.eval_shape(VAE(config.model.vae).init, jax.random.key(0), jnp.zeros((1, 8, 8, 3)))["params"]
    save_vae(tmp_path / "vae", config.model.vae, jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes), {})
    write(tmp_path / "set", config.model.vae, "generate", np.zeros((9, config.model.unet.text_dim)))
    assert "grad_norm" in "\n".join(loop.check(config, build_stage(config)))


@pytest.mark.parametrize(("file", "argument"), [(file, a) for file, args in PRECOMPUTE.items() for a in args])
def test_precompute_configs_build(file, argument):
    location = f"{REPOSITORY}/configs/{file}" + (f":{argument}" if argument else "")
    config = load_config(location, cls=PrecomputeConfig)
    assert config.source.name in {c.name for c in builder.Sprites.BUILDER_CONFIGS}


def test_the_shipped_autoencoder_is_the_one_its_config_makes():
    config = load_config(f"{REPOSITORY}/configs/vae.py")
    assert load_vae(SPRITES_VAE)[0] == config.model.vae
    assert SPRITES_VAE.stat().st_size < 5e6
    assert vae_manifest(SPRITES_VAE)["provenance"]


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


def test_conversion_is_never_imported_by_the_package():
    """Arrows point one way. (Messages may name its commands.)"""
    for path in (REPOSITORY / "dreamlite_jax").rglob("*.py"):
        assert not re.search(r"^\s*(from|import) (dreamlite_jax\.)?conversion", path.read_text(), re.M), path


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
    assert {".".join(path.parts) for path in found} | {"dreamlite_jax.conversion"} == set(listed)
