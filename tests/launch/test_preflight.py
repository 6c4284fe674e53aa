"""Preflight: a line a check, the right exit code, and nothing left behind."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from dreamlite_jax import train
from dreamlite_jax.assets import SPRITES_VAE
from dreamlite_jax.config import to_dict
from dreamlite_jax.data import latents
from dreamlite_jax.errors import UserError
from dreamlite_jax.model_folder import load_vae

ROOT = Path(__file__).parents[2]


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "launch" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def preflight(tmp_path, capsys):
    """Runs it on a tiny config over eight records; (exit code, verdict of each check, all that it printed)."""
    states, picture = np.ones((4, 24)), np.ones((16, 16, 16))
    items = [latents.Example(f"{i}", "generate", "x", picture, None, None, states, (128, 128)) for i in range(8)]
    (tmp_path / "latents").mkdir()
    latents.write_shard(latents.shard_path(tmp_path / "latents", 0, 1), iter(items))
    latents.write_info(tmp_path / "latents", {"shards": 1, "vae": to_dict(load_vae(SPRITES_VAE)[0])}, states[:2])

    def run(*arguments: str, workdir: str = "new/run") -> tuple[int, dict[str, str], str]:
        config = f"{Path(__file__).parent}/pod_config.py:{tmp_path}"
        code = load("preflight").main(["--config", config, "--workdir", str(tmp_path / workdir), *arguments])
        said = capsys.readouterr().out
        lines = [line.replace("left out", "left_out") for line in said.splitlines()]
        return code, {line.split()[1].rstrip(":"): line.split()[0] for line in lines}, said

    run.root = tmp_path
    return run


def test_all_is_well_and_nothing_is_left(preflight):
    one_level = {  # quicker to compile
        "block_out_channels": (64,), "down_blocks": ("plain",), "up_blocks": ("plain",), "transformer_layers": (1,),
        "num_heads": (1,),
    }  # fmt: skip
    overrides = (f"--config.model.unet.{name}={value}" for name, value in one_level.items())
    code, verdicts, said = preflight("--config.mesh.fsdp=2", *overrides)
    assert code == 0, said
    assert verdicts == dict.fromkeys(("config", "storage", "devices", "data", "batch", "step"), "ok")
    assert "cpu: 8 device(s), data 4 x fsdp 2, 2 rows a device" in said and "loss" in said
    assert {path.name for path in preflight.root.iterdir()} == {"latents"}


def test_what_does_not_depend_on_a_failure_is_still_checked(preflight):
    code, verdicts, said = preflight("--config.data.sources.0.path=/nowhere")
    assert code == 1
    assert verdicts["data"] == "FAILED" and verdicts["batch"] == verdicts["step"] == "left_out"
    assert verdicts["storage"] == verdicts["devices"] == "ok"
    assert "/nowhere holds no complete set of latents" in said


def test_a_mesh_that_the_devices_do_not_fill(preflight):
    code, verdicts, said = preflight("--config.mesh.fsdp=3")
    assert code == 1 and verdicts["devices"] == "FAILED" and "this run has 8" in said


def test_a_batch_that_the_devices_cannot_share(preflight):
    code, verdicts, said = preflight("--config.data.batch_size=12")
    assert code == 1 and verdicts["devices"] == "FAILED" and "12 is not a multiple of 8 devices" in said


def test_a_workdir_of_something_else(preflight):
    code, verdicts, said = preflight("--config.mesh.fsdp=3", workdir="latents")
    assert code == 1 and verdicts["storage"] == "FAILED" and verdicts["batch"] == "ok", said


@pytest.mark.parametrize("made", [True, False])
def test_hosts_side_by_side_try_one_workdir(tmp_path, monkeypatch, made):
    """Another host comes and goes while one is at it, and one that was killed has left its folder."""
    module, workdir, seen = load("preflight"), tmp_path / "runs" / "joint", []
    if made:
        (workdir / ".preflight.killed.tmp").mkdir(parents=True)
    before, rename = sorted(tmp_path.rglob("*")), module.os.rename

    def meeting(*paths):
        if not seen:
            seen.append(paths)
            module.storage(workdir)
        rename(*paths)

    monkeypatch.setattr(module.os, "rename", meeting)
    module.storage(workdir)
    assert seen and sorted(tmp_path.rglob("*")) == before
    train.check_workdir(workdir)
    train.prepare_workdir(workdir)
    assert list(workdir.iterdir()) == []


def test_data_that_are_not_numbers(preflight, monkeypatch):
    """A folder of a version that wrote them; this one refuses to."""
    path = latents.shard_path(preflight.root / "latents", 0, 1)
    states, picture = np.ones((4, 24)), np.full((16, 16, 16), np.nan)
    items = [latents.Example(f"{i}", "generate", "x", picture, None, None, states, (128, 128)) for i in range(8)]
    with pytest.raises(UserError, match="latents of the target hold 4096 NaN"):
        latents.write_shard(path, iter(items))
    with monkeypatch.context() as unchecked:
        unchecked.setattr(latents, "check_range", lambda *_: None)
        latents.write_shard(path, iter(items))
    code, verdicts, said = preflight()
    assert code == 1 and (verdicts["data"], verdicts["batch"]) == ("FAILED", "left_out")
    assert "record 0 (0): latents of the target hold 4096 NaN" in said


def test_a_typo_in_the_config_is_bad_input(preflight):
    from dreamlite_jax.errors import UserError

    with pytest.raises(UserError, match="did you mean 'steps'"):
        preflight("--config.stesp=3")
