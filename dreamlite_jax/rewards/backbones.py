"""The judges' base models by number: what is compiled where their config.json is not at hand.

Embeddings have one row a token of the judge's tokenizer, its special token included; the released checkpoints were cut
to that.
"""

from dreamlite_jax.models.qwen_vl.config import QwenVLConfig, TextTowerConfig, VisionTowerConfig
from dreamlite_jax.rewards.config import Backbone


def qwen2_text(
    vocab_size: int, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, theta: float, eps: float
):
    """Text tower of the two older families; heads are 128 wide."""
    return TextTowerConfig(
        vocab_size, hidden, mlp, layers, heads, kv_heads, 128, theta, (16, 24, 24),
        mrope_interleaved=False, qk_norm=False, qkv_bias=True, norm_eps=eps,
    )  # fmt: skip


def qwen2_5_vision(out: int) -> VisionTowerConfig:
    return VisionTowerConfig(
        32, 1280, 3420, 16, out, family="qwen2_5_vl", full_blocks=(7, 15, 23, 31), window_px=112, patch_size=14
    )


BACKBONES: dict[Backbone, QwenVLConfig] = {
    "qwen2_vl_7b": QwenVLConfig(
        qwen2_text(151658, 3584, 18944, 28, 28, 4, 1e6, 1e-6),
        VisionTowerConfig(32, 1280, 5120, 16, 3584, family="qwen2_vl", patch_size=14),
    ),
    "qwen2_5_vl_7b": QwenVLConfig(qwen2_text(151666, 3584, 18944, 28, 28, 4, 1e6, 1e-6), qwen2_5_vision(3584)),
    # Its report gives the sizes; rotation, norm and vocabulary are as in MiMo-7B, to be read from config.json.
    "mimo_vl_7b": QwenVLConfig(qwen2_text(151666, 4096, 11008, 36, 32, 8, 640000.0, 1e-5), qwen2_5_vision(4096)),
    "qwen3_vl_8b": QwenVLConfig(
        TextTowerConfig(151670, 4096, 12288, 36, 32, 8, 128, 5e6, (24, 20, 20)),
        VisionTowerConfig(
            27, 1152, 4304, 16, 4096, family="qwen3_vl", deepstack_indexes=(8, 16, 24), num_position_embeddings=2304
        ),
    ),
}
