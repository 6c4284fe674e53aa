"""A small released pipeline with random weights: the oracle, and the folder that holds it on disk."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
from PIL import Image
from qwen_oracle import give, rotary, tokenizer_files, watch

from dreamlite_jax.config import SchedulerConfig, VAEConfig
from dreamlite_jax.text.templates import user_text

TEXT_DIM = 48
UNET = dataclasses.replace(oracles.SMALL_UNET, text_dim=TEXT_DIM)
VAE = VAEConfig(width=8)
SCHEDULER = SchedulerConfig(base_shift=0.45, max_shift=1.16)  # neither the defaults of diffusers nor ours


def picture(width: int = 300, height: int = 200, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A smooth random picture, with some transparency where the mode has it."""
    values = np.random.default_rng(seed).integers(0, 256, (12, 16, 4), np.uint8)
    return Image.fromarray(values, "RGBA").resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def text_encoder(state: str = "before_norm") -> Any:
    """A `Qwen3VLForConditionalGeneration` of width `TEXT_DIM`, every parameter away from its initial value.

    Args:
      state: what its `hidden_states[-1]` are, whatever transformers runs; "" leaves that to transformers.
    """
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3VLConfig(
        text_config={
            "vocab_size": 151936, "hidden_size": TEXT_DIM, "intermediate_size": 64, "num_hidden_layers": 3,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
            **rotary(5e6, [6, 5, 5], mrope_interleaved=True),
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": TEXT_DIM,
            "deepstack_visual_indexes": [0, 1],
        },
        tie_word_embeddings=True,
    )  # fmt: skip
    model = oracles.randomize(transformers.Qwen3VLForConditionalGeneration(config), 1, {})
    return give(model, state) if state else model


def processor(tokenizer: Any) -> Any:
    """The processor without videos: theirs needs torchvision."""
    transformers = pytest.importorskip("transformers")
    size = {"shortest_edge": 65536, "longest_edge": 16777216}
    settings = dict(patch_size=16, temporal_patch_size=2, merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    except ModuleNotFoundError:  # transformers 4

        class OlderProcessor(transformers.Qwen3VLProcessor):
            attributes = ("image_processor", "tokenizer")

            def __init__(self, image_processor: Any, tokenizer: Any):
                self.image_processor, self.tokenizer, self.chat_template = image_processor, tokenizer, None
                for kind in ("image", "video"):
                    setattr(self, f"{kind}_token", f"<|{kind}_pad|>")
                    setattr(self, f"{kind}_token_id", tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>"))

        return OlderProcessor(transformers.Qwen2VLImageProcessor(**settings, size=size), tokenizer)

    class PictureProcessor(transformers.Qwen3VLProcessor):
        @classmethod
        def get_attributes(cls):
            return ["image_processor", "tokenizer"]

        def check_argument_for_proper_class(self, name, value):
            return type(value)

    return PictureProcessor(image_processor=Qwen2VLImageProcessorPil(**settings, size=size), tokenizer=tokenizer)


def prompt_pipeline(state: str = "before_norm") -> Any:
    """diffusers' pipeline with a small random text encoder and no U-Net or VAE."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_files())
    return diffusers.DreamLitePipeline(
        text_encoder=text_encoder(state), tokenizer=tokenizer, processor=processor(tokenizer), vae=None, unet=None,
        scheduler=None,
    )  # fmt: skip


def write_prompt_parts(pipeline: Any, folder: Path) -> Path:
    """The three folders of a released pipeline that encode prompts."""
    pipeline.text_encoder.save_pretrained(folder / "text_encoder")
    pipeline.tokenizer.save_pretrained(folder / "tokenizer")
    pipeline.processor.image_processor.save_pretrained(folder / "processor")
    return folder


RECORD = "states.npz"
WORDS = "a red fox on a frozen lake"  # what is encoded, beside the null prompt


def record_states(folder: Path) -> None:
    """What the pipeline itself makes of prompts under the transformers that runs, unchanged; beside its parts.

    Of each mode: the rows of its two texts, and how far `hidden_states[-1]` is from each side of the final norm.
    """
    import torch
    import transformers

    pipeline = prompt_pipeline(state="")
    seen, found = watch(pipeline.text_encoder), {"version": np.array(transformers.__version__)}

    def compare(module: Any, args: Any, output: Any) -> None:
        seen["last"] = output.hidden_states[-1]

    pipeline.text_encoder.register_forward_hook(compare)
    for mode in ("generate", "edit"):
        image = {"image": picture()} if mode == "edit" else {}
        with torch.no_grad():
            states, mask = pipeline.encode_prompt(mode, ["", user_text(mode, WORDS)], "cpu", torch.float32, **image)
        for i, (row, kept) in enumerate(zip(states, mask, strict=True)):
            found[f"{mode}_{i}"] = row[: int(kept.sum())].numpy()
        for state in ("before_norm", "after_norm"):
            found[f"{mode}_{state}"] = (seen["last"] - seen[state]).abs().max().numpy()
    np.savez(write_prompt_parts(pipeline, folder) / RECORD, **found)


def components() -> dict[str, Any]:
    """What both pipelines are made of."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_files())
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=SCHEDULER.base_shift,
        max_shift=SCHEDULER.max_shift,
        base_image_seq_len=SCHEDULER.base_seq_len,
        max_image_seq_len=SCHEDULER.max_seq_len,
    )
    return {
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer,
        "processor": processor(tokenizer),
        "vae": oracles.torch_vae(VAE),
        "unet": oracles.torch_unet(UNET, sensitive=False),
        "scheduler": scheduler,
    }


def write(folder: Path, parts: dict[str, Any], pipeline: str, **save: Any) -> Path:
    """The folder as diffusers lays it out; `save` goes to the U-Net's `save_pretrained` (max_shard_size …)."""
    folder.mkdir()
    for name in ("text_encoder", "tokenizer", "vae", "scheduler"):
        parts[name].save_pretrained(folder / name)
    parts["unet"].save_pretrained(folder / "unet", **save)
    parts["processor"].image_processor.save_pretrained(folder / "processor")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline, "_diffusers_version": "0.42.1"}))
    return folder
