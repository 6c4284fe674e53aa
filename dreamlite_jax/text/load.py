"""The prompt encoder that a config names."""

import functools
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike

from dreamlite_jax.config import TextConfig
from dreamlite_jax.errors import UserError
from dreamlite_jax.tensor_files import sha256_of
from dreamlite_jax.text.encoder import PromptEncoder
from dreamlite_jax.text.tokenizers import MiniLMTokenizer


def load_encoder(
    config: TextConfig, directory: str | Path = ".", *, dtype: DTypeLike = jnp.bfloat16, mesh: Mesh | None = None
) -> PromptEncoder:
    """Loads the encoder and checks that it is the one the network was trained with.

    Args:
      directory: the model folder. A `config.source` of Qwen3-VL that is a relative path begins there.
      dtype: of Qwen3-VL's weights and computation; MiniLM is always float32.
      mesh: of this process's devices, to split Qwen3-VL's weights and rows over; MiniLM needs none.

    Raises:
      UserError: the weights are missing, damaged, or differ from `config.sha256`.
    """
    if config.encoder == "qwen3_vl":
        from dreamlite_jax.models.qwen_vl.load import weight_files
        from dreamlite_jax.text.qwen_encoder import BUCKETS, QwenEncoder, weights_folder

        folder = Path(directory) / config.source  # an absolute source stands alone
        if not any((folder / name).is_file() for name in ("text_encoder/config.json", "config.json")):
            raise UserError(
                f"text.source {config.source}: {folder} has no text_encoder/config.json; this model's prompts are "
                "encoded by Qwen3-VL, whose folders text_encoder, tokenizer and processor belong there"
            )
        if config.sha256:
            check_sha256(config, sha256_of(weight_files(weights_folder(folder))))
        buckets = buckets_up_to(config.max_length, BUCKETS)
        return QwenEncoder.load(folder, state=config.state, dtype=dtype, mesh=mesh, buckets=buckets)
    from dreamlite_jax.models.minilm import load_minilm, minilm_directory, weights_sha256
    from dreamlite_jax.text.minilm_encoder import MiniLMEncoder

    directory = minilm_directory()
    if config.sha256:
        check_sha256(config, weights_sha256(directory))
    _, params = load_minilm(directory)
    buckets = buckets_up_to(config.max_length, (16, 32, 48, 64, 128, 256))
    return MiniLMEncoder(params, max_length=config.max_length, buckets=buckets)


def encoder_sha256(config: TextConfig, directory: str | Path = ".") -> str:
    """The sha256 of the weights that `load_encoder` would load. Raises `UserError` where they are missing."""
    if config.encoder == "qwen3_vl":
        from dreamlite_jax.models.qwen_vl.load import weight_files
        from dreamlite_jax.text.qwen_encoder import weights_folder

        return sha256_of(weight_files(weights_folder(Path(directory) / config.source)))
    from dreamlite_jax.models.minilm import weights_sha256

    return weights_sha256()


def unread(config: TextConfig, prompt: str) -> str:
    """What the encoder of a config cannot read of a prompt, see `words.unread`; the encoder is not loaded for it."""
    return "" if config.encoder == "qwen3_vl" else _minilm_tokenizer().unread(prompt)  # Qwen's tokenizer reads bytes


@functools.cache
def _minilm_tokenizer() -> MiniLMTokenizer:
    return MiniLMTokenizer()


def buckets_up_to(longest: int, usual: Sequence[int]) -> tuple[int, ...]:
    """The usual padded lengths below the longest, and that."""
    return (*(length for length in usual if length < longest), longest)


def check_sha256(config: TextConfig, found: str) -> None:
    """Raises `UserError` unless the weights are those that the config names."""
    if found != config.sha256:
        raise UserError(
            f"text.sha256: the encoder's weights in {config.source} have sha256 {found[:12]}…, but the model was "
            f"trained with {config.sha256[:12]}…; install the version it names"
        )
