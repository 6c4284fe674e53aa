"""Rewards from their configs."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from dreamlite_jax.assets import vae_path
from dreamlite_jax.errors import UserError
from dreamlite_jax.models.qwen_vl.config import QwenVLConfig
from dreamlite_jax.models.qwen_vl.load import load_params, read_config
from dreamlite_jax.models.qwen_vl.model import abstract_params, param_shardings
from dreamlite_jax.rewards.backbones import BACKBONES
from dreamlite_jax.rewards.base import Reward, RewardSum, Term
from dreamlite_jax.rewards.config import RewardConfig
from dreamlite_jax.rewards.judges import EDIT_REWARD, HPSV3, Form, Judge, JudgeTokenizer
from dreamlite_jax.rewards.network import RewardNetwork, head_names
from dreamlite_jax.rewards.perceptual import TargetReward

FAMILIES = {
    "qwen2_vl_7b": "qwen2_vl",
    "qwen2_5_vl_7b": "qwen2_5_vl",
    "mimo_vl_7b": "qwen2_5_vl",
    "qwen3_vl_8b": "qwen3_vl",
}


def load_rewards(configs: Sequence[RewardConfig], mesh: Mesh | None = None, *, abstract: bool = False) -> RewardSum:
    """All rewards of a stage, named by kind (and number, where one kind comes twice).

    Args:
      mesh: with axes (data, fsdp): parameters of judges are split over fsdp as they are read.
      abstract: judges have shapes for parameters and need no files: enough to compile a step.
    """
    terms, kinds = [], [config.kind for config in configs]
    for i, config in enumerate(configs):
        name = config.kind if kinds.count(config.kind) == 1 else f"{config.kind}_{i}"
        terms.append(Term(name, load_reward(config, mesh, abstract=abstract), config.weight, config.tasks))
    return RewardSum(terms)


def load_reward(config: RewardConfig, mesh: Mesh | None = None, *, abstract: bool = False) -> Reward:
    """One reward; raises `UserError` where a file is missing or does not belong to the model."""
    if config.kind == "target":
        return TargetReward.from_vae(vae_path(config.checkpoint))
    return abstract_judge(config) if abstract else load_judge(config, mesh)


def load_judge(config: RewardConfig, mesh: Mesh | None = None) -> Judge:
    """A released judge: the checkpoint's weights, its base model's config.json and tokenizer.json.

    Raises:
      UserError: a file is missing or of another kind, the base model is of another family than `config.backbone`, or a
        tensor is missing, unknown or misshapen (it is named).
    """
    for name in ("checkpoint", "base"):
        if not getattr(config, name):
            raise UserError(f"rewards: {config.kind} needs {name}, a path; see `RewardConfig`")
    checkpoint, base = Path(config.checkpoint), Path(config.base)
    if not checkpoint.exists():
        raise UserError(f"rewards: checkpoint {checkpoint} does not exist")
    if checkpoint.suffix in (".pth", ".pt", ".bin"):
        raise UserError(f"rewards: checkpoint {checkpoint} is a pickle; store its tensors as safetensors first")
    tokenizer = JudgeTokenizer(base / "tokenizer.json")
    check_chat(base, form_of(config))
    architecture = read_config(base)
    family = architecture.vision.family
    if family != FAMILIES[config.backbone]:
        raise UserError(f"{base / 'config.json'}: model_type is {family!r}; backbone {config.backbone!r} has another")
    text = dataclasses.replace(architecture.text, vocab_size=tokenizer.size)
    network = judge_network(config, dataclasses.replace(architecture, text=text))
    shapes = abstract_params(network)
    placement = None if mesh is None else param_shardings(shapes, mesh)
    params = load_params(weights(checkpoint), shapes, network.config, placement, head_names(network.heads))
    return judge(config, network, params, tokenizer)


TEMPLATES = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")  # the first that has one counts


def check_chat(base: Path, form: Form) -> None:
    """Raises `UserError` when the base model's chat template is there and begins chats with other words than `form`."""
    for path in (base / name for name in TEMPLATES):
        text = path.read_text("utf-8") if path.is_file() else ""
        if text and (path.suffix == ".jinja" or '"chat_template"' in text):
            if form.system not in text:
                raise UserError(f"{path} never says {form.system!r}, the words that the judge's chat begins with")
            return


def weights(checkpoint: Path) -> Path:
    """The only safetensors file of a folder, whatever its name (HPSv3.safetensors); else the path itself."""
    files = list(checkpoint.glob("*.safetensors")) if checkpoint.is_dir() else []
    return files[0] if len(files) == 1 else checkpoint


def abstract_judge(config: RewardConfig) -> Judge:
    """A judge with shapes for parameters, those of its released base model."""
    network = judge_network(config, BACKBONES[config.backbone])
    return judge(config, network, abstract_params(network), None)


def judge_network(config: RewardConfig, architecture: QwenVLConfig) -> RewardNetwork:
    dtype = jnp.dtype(config.dtype)
    return RewardNetwork(architecture, dtype, dtype, remat=True, heads=len(form_of(config).texts))


def judge(config: RewardConfig, network: RewardNetwork, params: Any, tokenizer: JudgeTokenizer | None) -> Judge:
    height, width = config.size_px
    return Judge(
        network, params, form_of(config), tokenizer, height=height, width=width, prompt_tokens=config.prompt_tokens
    )


def form_of(config: RewardConfig) -> Form:
    return HPSV3 if config.kind == "hpsv3" else EDIT_REWARD[config.backbone]
