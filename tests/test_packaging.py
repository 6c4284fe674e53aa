"""Installed without a checkout: the source distribution and its wheel are whole, and train from an empty folder."""

import configparser
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tiny
from packaging.requirements import Requirement
from test_layout import write

from dreamlite_jax import config_files
from dreamlite_jax.assets import SPRITES_VAE
from dreamlite_jax.errors import UserError
from dreamlite_jax.model_folder import load_vae

ROOT = Path(__file__).parents[1]
PLACES = {
    "dreamlite_jax": "dreamlite_jax",
    "conversion": "dreamlite_jax/conversion",
    "configs": "dreamlite_jax/configs",
}
# Where a machine keeps what it made of a checkout.
MADE = shutil.ignore_patterns("__pycache__", ".*cache", ".git", ".venv*", "runs", "build", "dist", "*.egg-info")


def build(kind: str, tree: Path, to: Path) -> Path:
    """The distribution that pip would make of this tree; what it warned of is an error."""
    pytest.importorskip("setuptools", minversion="77")
    code = f"from setuptools import build_meta; open('made', 'w').write(build_meta.build_{kind}({str(to)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr and "Warning" not in done.stdout, done.stderr
    return to / (tree / "made").read_text()


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT, folder / "tree", ignore=MADE)
    made = build("sdist", folder / "tree", folder)
    with tarfile.open(made) as archive:
        archive.extractall(folder, filter="data")
    return folder / made.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def site(unpacked):
    """A site-packages folder with the wheel of the source distribution, as pip unpacks it."""
    with zipfile.ZipFile(build("wheel", unpacked, unpacked.parent)) as archive:
        archive.extractall(unpacked.parent / "site")
    return unpacked.parent / "site"


def files(folder: Path) -> set[str]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if "__pycache__" not in path.parts}


def test_the_source_distribution_holds_the_checkout(unpacked):
    for folder in ("dreamlite_jax", "conversion", "configs", "launch", "tests", ".ci"):
        assert files(ROOT / folder) == files(unpacked / folder)
    for name in ("constraints.txt", "setup.cfg", "pyproject.toml", "ruff.toml", "LICENSE", "README.md"):
        assert (unpacked / name).read_bytes() == (ROOT / name).read_bytes() or name == "setup.cfg"
    assert os.access(unpacked / "launch" / "setup.sh", os.X_OK)


def test_the_wheel_holds_every_module_config_and_weight(site):
    for folder, place in PLACES.items():
        wanted = {name for name in files(ROOT / folder) if name.endswith((".py", ".safetensors", ".json"))}
        assert wanted and wanted <= files(site / place)
    assert not {path.name for path in site.iterdir()} & {
        "configs",
        "conversion",
        "tests",
        "launch",
    }  # others' names too


INSTALLED = """
import sys
from pathlib import Path
from dreamlite_jax import config_files, train
from dreamlite_jax.training.config import read_config_file
site, root = Path(sys.argv[1]), sys.argv[2]
assert config_files.folder() == site / "dreamlite_jax" / "configs", config_files.folder()
print(len([read_config_file(name) for name in config_files.names()]))
sys.exit(train.main(["--config", f"quickstart:t2i,{root}", "--workdir", "run", "--check"]))
"""


def test_an_installed_user_trains_from_an_empty_folder(site, tmp_path):
    for name in ("t2i", "t2i_validation"):
        write(tmp_path / "data" / "latents" / name, load_vae(SPRITES_VAE)[0], "generate", np.zeros((9, tiny.TEXT_DIM)))
    (tmp_path / "empty").mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", INSTALLED, str(site), str(tmp_path / "data")],
        cwd=tmp_path / "empty", env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    count, *report = done.stdout.splitlines()
    assert int(count) == len(config_files.names()) and any("batch 32" in line for line in report)
    assert not any((tmp_path / "empty").iterdir())


@pytest.mark.parametrize(
    ("location", "parts"),
    [
        ("quickstart:t2i", ("quickstart", "t2i")),
        ("quickstart", ("quickstart", "")),
        ("mine.py", ("mine.py", "")),
        ("dreamlite.py:t2i_256,gs://bucket", ("dreamlite.py", "t2i_256,gs://bucket")),
        ("dreamlite:t2i_256,gs://bucket", ("dreamlite", "t2i_256,gs://bucket")),
        ("a:b/c.py", ("a:b/c.py", "")),
        ("a:b/c.py:x:y", ("a:b/c.py", "x:y")),
    ],
)
def test_what_a_location_says(location, parts):
    assert config_files.split(location) == parts


def test_a_file_on_disk_wins_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert config_files.find("demo") == ROOT / "configs" / "demo.py"
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "demo.py").write_text("")
    assert config_files.find("configs/demo.py") == Path("configs/demo.py")
    (tmp_path / "demo").write_text("")
    with pytest.raises(UserError, match="demo: not a Python file"):
        config_files.find("demo")


@pytest.mark.parametrize("path", ["quikstart", "quikstart.py", "", "configs", "../quickstart"])
def test_an_unknown_name_lists_what_there_is(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no such file.*(demo, dreamlite, .*, vae|--config quickstart)$"):
        config_files.find(path)


def test_a_file_that_is_not_there_names_the_one_of_the_package(tmp_path, monkeypatch):
    """Not taken in its place: it may be a file of one's own, looked for from the wrong folder."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"configs/vae.py: no such file; .* is --config vae$"):
        config_files.find("configs/vae.py")


def test_every_python_that_is_promised_has_its_pins():
    """One pin of each package for each Python, and PyTorch where it can be had alone."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line.partition("  #")[0]) for line in lines if line and not line.startswith("#")]
    classifiers = config["metadata"]["classifiers"]
    versions = [line.split(" :: ")[-1] for line in classifiers.splitlines() if "Python :: " in line]
    assert versions == ["3.11", "3.12", "3.13"]
    for version in versions:
        holding = [pin.name for pin in pins if not pin.marker or pin.marker.evaluate({"python_version": version})]
        assert len(holding) == len(set(holding))
        assert {pin.name for pin in pins} - set(holding) == (set() if version == "3.11" else {"torch", "diffusers"})
