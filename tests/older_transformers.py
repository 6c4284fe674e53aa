"""Another version of transformers beside the installed one: that which released weights were made with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOKENIZERS = {"4.45.2": "0.20.*", "4.56.1": "0.22.*", "4.57.0": "0.22.*", "4.57.3": "0.22.*"}  # what each asks for


DIFFUSERS = "diffusers==0.39.0"  # the last that takes the huggingface_hub of transformers 4, and has DreamLite


def install(version: str, folder: Path, *more: str) -> Path:
    """Puts that version of transformers into `folder`, everything else it needs being installed; skips without pip."""
    wanted = [f"transformers=={version}", f"tokenizers=={TOKENIZERS[version]}", "huggingface_hub<1", *more]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"transformers {version} cannot be installed here: {done.stderr.strip()[-300:]}")
    return folder


def run(code: str, *arguments: str, older: Path | None = None) -> str:
    """What `code` prints in a process of its own, with the modules of tests/ and, before all, those of `older`."""
    root = Path(__file__).parents[1]
    path = [*([str(older)] if older else []), str(root / "tests"), str(root)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
