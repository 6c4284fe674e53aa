"""Stages and batches made of shapes alone are the real ones: those of files that are here, beside those of none."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tiny
from reward_oracle import Oracle

from dreamlite_jax.config import from_dict
from dreamlite_jax.models.qwen_vl.load import read_config
from dreamlite_jax.rewards.backbones import BACKBONES
from dreamlite_jax.rewards.judges import HPSV3, JudgeTokenizer
from dreamlite_jax.training.build import build
from dreamlite_jax.training.config import TrainConfig, load_config

REPOSITORY = Path(__file__).parents[2]
DMD = {"fake_updates": 2, "gan_generator_weight": 5e-3, "gan_fake_weight": 1e-2}


def rewards(root: Path, prompt_tokens: int) -> list[dict[str, Any]]:
    """One that needs no files, and a judge that reads prompts."""
    judge = {"checkpoint": f"{root}/judge/checkpoint.safetensors", "base": f"{root}/judge/base", "size_px": (16, 16)}
    return [{"kind": "target"}, {"kind": "hpsv3", "prompt_tokens": prompt_tokens, **judge}]


def config(root: Path, stage: str, *, prompt_tokens: int = 24, **changes: Any) -> TrainConfig:
    parts = {"refl": {"refl": {"rewards": rewards(root, prompt_tokens), "steps": 2}}, "dmd2": {"dmd": DMD}}
    mapping = tiny.train_config(root, stage=stage, **parts.get(stage, {}), **changes)
    mapping["model"] = {**mapping["model"], "guidance_scale": 1.0, "image_guidance_scale": 1.0}
    return from_dict(TrainConfig, mapping, "config")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Latents, a model and a small judge in the released layout."""
    folder = tiny.write_inputs(tmp_path_factory.mktemp("abstract"))
    (folder / "judge").mkdir()
    Oracle.of("qwen2_vl", HPSV3).save(folder / "judge", old_names=False)
    return folder


@pytest.fixture
def small_judge(root, monkeypatch):
    """The base model that the judge's config names is the small one."""
    architecture = read_config(root / "judge" / "base")
    rows = JudgeTokenizer(root / "judge" / "base" / "tokenizer.json").size
    text = dataclasses.replace(architecture.text, vocab_size=rows)
    monkeypatch.setitem(BACKBONES, "qwen2_vl_7b", dataclasses.replace(architecture, text=text))


def described(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every array, by its place."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): (tuple(x.shape), str(x.dtype)) for path, x in leaves}


def program(stage: Any, batch: Any) -> str:
    """The step, equation by equation."""
    text = str(jax.make_jaxpr(stage.step)(stage.state_shapes(), batch))
    return re.sub(r" at 0x[0-9a-f]+", "", text)


@pytest.mark.parametrize(
    "stage", ["flow_matching", *(pytest.param(s, marks=pytest.mark.slow) for s in ("refl", "dmd2"))]
)
def test_without_files_all_is_as_with_them(root, small_judge, stage):
    real, bare = build(config(root, stage)), build(config(Path("nowhere"), stage), shapes_only=True)
    batch = bare.feed.batch(bare.stage.fields)
    assert described(batch) == described(next(iter(real.feed.dataset(real.stage.fields))))
    state = described(bare.stage.state_shapes())
    assert state == described(real.stage.state_shapes()) == described(real.stage.init_state())
    same = program(bare.stage, batch) == program(real.stage, batch)  # on its own: nobody wants to see the difference
    assert same
    other = build(config(Path("nowhere"), stage, prompt_tokens=25, remat=True), shapes_only=True)
    others = other.feed.batch(other.stage.fields)
    assert program(other.stage, others) != program(real.stage, batch)
    if stage == "refl":
        assert described(others) != described(batch)
        judge = {name: what for name, what in state.items() if name.startswith(".frozen['rewards']['hpsv3']")}
        assert ((1, 64, 96), "bfloat16") not in judge.values() and ((2, 64, 96), "bfloat16") in judge.values()
        assert {name for name in described(batch) if "tokens/hpsv3" in name} == {
            f"['tokens/hpsv3/{name}']" for name in ("ids", "mask", "positions")
        }


def test_the_judges_of_the_full_size_are_part_of_the_state():
    """As many numbers as in the released base models, less the rows that their tables were cut by, and the heads."""
    stage, feed, _ = build(load_config(f"{REPOSITORY}/configs/dreamlite_post.py:refl"), shapes_only=True)
    found = stage.state_shapes().frozen["rewards"]
    counts = {name: sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree)) for name, tree in found.items()}
    head = 3584 * 1024 + 1024 + 1024 * 16 + 16 + 16 * 2 + 2
    assert counts == {
        "hpsv3": 7_746_378_240 - (152064 - 151658) * 3584 + head,
        "editreward": 7_747_169_280 - (152064 - 151666) * 3584 + 2 * head,
    }
    large = [x for x in jax.tree.leaves(found) if x.size > 2**20]
    assert {str(x.dtype) for x in large} == {"bfloat16", "float32"}  # heads are float32
    batch = feed.batch(stage.fields)
    assert batch["tokens/hpsv3/ids"].shape == (128, 1, 256 + 2 + 528 + 256)
    assert batch["tokens/editreward/positions"].shape == (128, 2, 3, 2 * (256 + 2) + 424 + 256)
    assert batch["target"].shape == (128, 64, 64, 4)
