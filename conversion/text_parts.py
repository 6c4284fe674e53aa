"""The text encoder of a model folder as a component to convert: weights, size, tokenizer; MiniLM or Qwen3-VL."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dreamlite_jax.config import ModelConfig
from dreamlite_jax.errors import UserError
from dreamlite_jax.models import minilm
from dreamlite_jax.models.qwen_vl.load import load_qwen_vl, read_config
from dreamlite_jax.models.qwen_vl.model import QwenVL, abstract_params
from dreamlite_jax.text import tokenizers
from dreamlite_jax.text.qwen_encoder import GENERATE_TOKENS, weights_folder
from dreamlite_jax.text.qwen_inputs import QwenTokenizer
from dreamlite_jax.text.templates import GENERATE_CHAT, Task, user_text

TOWER = "language_model"  # the part of Qwen3-VL that reads words


def check(model: Path, config: ModelConfig) -> None:
    """Raises `UserError` when the encoder is missing, or not the one that the model was trained with."""
    if config.text.encoder == "qwen3_vl":
        if not present(model, config):
            raise UserError(
                f"text.source {config.text.source}: {_qwen_folder(model, config)} has no config.json; without its text "
                "encoder a model is converted by --component unet, vae_encoder and vae_decoder"
            )
        return
    found = minilm.weights_sha256()
    if config.text.sha256 and found != config.text.sha256:
        raise UserError(
            f"text.sha256: the encoder's weights have sha256 {found[:12]}…, but the model was trained with "
            f"{config.text.sha256[:12]}…; install the version it names"
        )


def present(model: Path, config: ModelConfig) -> bool:
    """Whether the encoder's weights are here: MiniLM is installed, Qwen3-VL is part of some folders."""
    return config.text.encoder == "minilm" or (_qwen_folder(model, config) / "config.json").is_file()


def load(model: Path, config: ModelConfig) -> tuple[dict[str, Any], Any]:
    """Parameters in float32 and the architecture, MiniLM's or that of Qwen3-VL's text tower."""
    check(model, config)
    if config.text.encoder == "qwen3_vl":
        qwen, params = load_qwen_vl(_qwen_folder(model, config), final_norm=config.text.state == "after_norm")
        return jax.tree.map(np.asarray, params[TOWER]), qwen.config.text
    text, params = minilm.load_minilm()
    return params, text


def weight_bytes(model: Path, config: ModelConfig) -> int:
    """Bytes of float32 weights, without reading them."""
    check(model, config)
    if config.text.encoder == "qwen3_vl":
        shapes = abstract_params(QwenVL(read_config(_qwen_folder(model, config))))[TOWER]
        return 4 * sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
    return minilm.minilm_file(minilm.WEIGHT_FILE).stat().st_size


def token_counts(model: Path, config: ModelConfig, prompts: Sequence[tuple[Task, str]]) -> list[int]:
    """States that prompts without a picture need of the encoder."""
    texts = [user_text(task, prompt) for task, prompt in prompts]
    if config.text.encoder == "minilm":
        return [len(ids) for ids in tokenizers.MiniLMTokenizer().token_ids(texts)]
    tokenizer = _qwen_tokenizer(model, config)
    chats = [tokenizer.chat(GENERATE_CHAT, tokenizer.words(text)) for text in texts]
    return [min(GENERATE_TOKENS, len(chat) - GENERATE_CHAT.dropped_tokens) for chat in chats]


def write_tokenizer(model: Path, config: ModelConfig, folder: Path) -> dict[str, Any]:
    """Copies tokenizer.json and returns what else the runtime needs to make token ids, for its manifest."""
    if config.text.encoder == "minilm":
        shutil.copyfile(minilm.minilm_file("tokenizer.json"), folder / "tokenizer.json")
        return {"pad_id": tokenizers.MiniLMTokenizer().pad_id}
    chat = _qwen_tokenizer(model, config).chat(GENERATE_CHAT, [])
    shutil.copyfile(_tokenizer_file(model, config), folder / "tokenizer.json")
    dropped = GENERATE_CHAT.dropped_tokens
    return {"pad_id": 0, "chat": {"before": chat[:dropped], "after": chat[dropped:], "limit": GENERATE_TOKENS}}


def _qwen_tokenizer(model: Path, config: ModelConfig) -> QwenTokenizer:
    return QwenTokenizer(_tokenizer_file(model, config), read_config(_qwen_folder(model, config)))


def _tokenizer_file(model: Path, config: ModelConfig) -> Path:
    source = model / config.text.source
    places = [source / part / "tokenizer.json" for part in ("tokenizer", "processor", ".")]
    return next((path for path in places if path.is_file()), places[0])


def _qwen_folder(model: Path, config: ModelConfig) -> Path:
    return weights_folder(model / config.text.source)
