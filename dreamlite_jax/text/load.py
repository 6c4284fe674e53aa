"""The prompt encoder that a config names."""

from pathlib import Path

import jax.numpy as jnp
from jax.typing import DTypeLike

from dreamlite_jax.config import TextConfig
from dreamlite_jax.errors import UserError
from dreamlite_jax.text.encoder import PromptEncoder


def load_encoder(config: TextConfig, directory: str | Path = ".", *, dtype: DTypeLike = jnp.bfloat16) -> PromptEncoder:
    """Loads the encoder and checks that it is the one the network was trained with.

    Args:
      directory: the model folder. A `config.source` of Qwen3-VL that is a relative path begins there.
      dtype: of Qwen3-VL's weights and computation; MiniLM is always float32.

    Raises:
      UserError: the weights are missing, damaged, or (MiniLM) differ from `config.sha256`.
    """
    if config.encoder == "qwen3_vl":
        from dreamlite_jax.text.qwen_encoder import QwenEncoder

        folder = Path(directory) / config.source  # an absolute source stands alone
        if not any((folder / name).is_file() for name in ("text_encoder/config.json", "config.json")):
            raise UserError(
                f"text.source {config.source}: {folder} has no text_encoder/config.json; this model's prompts are "
                "encoded by Qwen3-VL, whose folders text_encoder, tokenizer and processor belong there"
            )
        return QwenEncoder.load(folder, dtype=dtype)
    from dreamlite_jax.models.minilm import load_minilm, minilm_directory, weights_sha256
    from dreamlite_jax.text.minilm_encoder import MiniLMEncoder

    directory = minilm_directory()
    found = weights_sha256(directory)
    if config.sha256 and found != config.sha256:
        raise UserError(
            f"text.sha256: the encoder's weights in {config.source} have sha256 {found[:12]}…, but the model was "
            f"trained with {config.sha256[:12]}…; install the version it names"
        )
    _, params = load_minilm(directory)
    buckets = (*tuple(n for n in (16, 32, 48, 64, 128, 256) if n < config.max_length), config.max_length)
    return MiniLMEncoder(params, max_length=config.max_length, buckets=buckets)
