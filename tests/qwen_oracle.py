"""A small Qwen3-VL of transformers with random weights."""

from typing import Any

import pytest

IMAGE, START, END = 101, 102, 103  # token ids
TEXT_SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
VISION_SIZES = {
    "depth": 4, "hidden_size": 48, "intermediate_size": 80, "num_heads": 4, "out_hidden_size": 64,
    "num_position_embeddings": 100, "deepstack_visual_indexes": [0, 2],
}  # fmt: skip
IDS = {"image_token_id": IMAGE, "vision_start_token_id": START, "vision_end_token_id": END, "video_token_id": 104}


def randomize(module: Any, seed: int = 1) -> Any:
    """Every parameter away from its initial value, so that norms and biases are part of the comparison."""
    torch = pytest.importorskip("torch")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.08 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def small_model() -> Any:
    """A `Qwen3VLForConditionalGeneration`."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    rotary = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    config = transformers.Qwen3VLConfig(
        text_config={**TEXT_SIZES, "rope_parameters": rotary, "tie_word_embeddings": True},
        vision_config=VISION_SIZES,
        tie_word_embeddings=True,
        **IDS,
    )
    return randomize(transformers.Qwen3VLForConditionalGeneration(config))
