"""Small judges of transformers with random weights, asked as the released code asks them."""

import dataclasses
import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from qwen_oracle import randomize, rotary, tokenizer_files

from dreamlite_jax.rewards.judges import EDIT_REWARD, HPSV3, Form, JudgeTokenizer
from dreamlite_jax.rewards.prompts import REQUEST, REWARD_TOKEN

SHOWN = (120, 88)  # height and width; the judges see (140, 112), or (128, 96) in patches of 16
PROMPTS = ["a red cat", "put the red cat with the long tail to the left of the house, please"]
CASES = {
    "hpsv3": ("qwen2_vl", "qwen2_vl_7b", HPSV3),
    "editreward": ("qwen2_5_vl", "qwen2_5_vl_7b", EDIT_REWARD["qwen2_5_vl_7b"]),
    "editreward3": ("qwen3_vl", "qwen3_vl_8b", EDIT_REWARD["qwen3_vl_8b"]),
}
ROWS = 151670  # tokens of the real tokenizer, and the special one
IDS = {
    "image_token_id": 151655, "vision_start_token_id": 151652, "vision_end_token_id": 151653, "video_token_id": 151656,
}  # fmt: skip
TEXT = {
    "vocab_size": ROWS, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "rms_norm_eps": 1e-6,
}  # fmt: skip
VISION = {
    "qwen2_vl": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "mlp_ratio": 2, "num_heads": 2},
    "qwen2_5_vl": {
        "depth": 4, "hidden_size": 32, "intermediate_size": 52, "num_heads": 2, "out_hidden_size": 64,
        "fullatt_block_indexes": [1, 3], "window_size": 56,
    },
    "qwen3_vl": {
        "depth": 3, "hidden_size": 32, "intermediate_size": 52, "num_heads": 2, "out_hidden_size": 64,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1],
    },
}  # fmt: skip


def version() -> tuple[int, ...]:
    """Of transformers."""
    transformers = pytest.importorskip("transformers")
    return tuple(int(part) for part in transformers.__version__.split(".")[:2])


def base_model(family: str) -> Any:
    """The family's model for generation, every parameter random."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    names = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL", "qwen3_vl": "Qwen3VL"}
    newest = family == "qwen3_vl"
    text = {**TEXT, **({"head_dim": 32} if newest else {})}
    text |= rotary(1e6, [6, 5, 5], **({"mrope_interleaved": True} if newest else {}))
    kind = getattr(transformers, f"{names[family]}Config")
    if version() < (4, 52):  # the text's sizes stood at the top
        config = kind(**text, vision_config=VISION[family], **IDS)
    else:
        config = kind(text_config=text, vision_config=VISION[family], **IDS)
    return randomize(getattr(transformers, f"{names[family]}ForConditionalGeneration")(config))


@dataclasses.dataclass(frozen=True)
class Oracle:
    """A judge of torch: the base model, one head a text, and how the released code runs them."""

    model: Any
    heads: Any
    form: Form

    @classmethod
    def of(cls, family: str, form: Form) -> "Oracle":
        import torch

        model = base_model(family)
        layers = torch.nn
        heads = layers.ModuleList(
            layers.Sequential(
                layers.Linear(64, 1024), layers.ReLU(), layers.Dropout(0.05), layers.Linear(1024, 16), layers.ReLU(),
                layers.Linear(16, 2),
            )
            for _ in form.texts
        )  # fmt: skip
        return cls(model, randomize(heads, seed=2), form)

    def save(self, folder: Path, *, old_names: bool) -> None:
        """checkpoint.safetensors in the released layout, and base/ with config.json and tokenizer.json."""
        state = {name: value.numpy().copy() for name, value in self.model.state_dict().items()}
        if old_names:
            state = {
                name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): value
                for name, value in state.items()
            }
        for i, head in enumerate(self.heads):
            prefix = "rm_head" if len(self.heads) == 1 else f"rm_heads.head_{i}"
            state |= {f"{prefix}.{name}": value.numpy().copy() for name, value in head.state_dict().items()}
        safetensors.numpy.save_file(state, folder / "checkpoint.safetensors")
        base = folder / "base"
        self.model.config.save_pretrained(base)
        config = json.loads((base / "config.json").read_text())
        config.get("text_config", config)["vocab_size"] = (
            152064  # of the base model; its reward model has a row a token
        )
        (base / "config.json").write_text(json.dumps(config))
        (base / "tokenizer.json").symlink_to(tokenizer_files() / "tokenizer.json")

    def chat(self, text: str, prompt: str, image_tokens: int) -> str:
        """The whole chat as one string, its end included."""
        picture = f"<|vision_start|>{'<|image_pad|>' * image_tokens}<|vision_end|>"
        system = f"<|im_start|>system\n{self.form.system}<|im_end|>\n" if self.form.system else ""
        words = text.format(prompt) + REQUEST + REWARD_TOKEN + "\n\nEND\n"
        pictures = picture * (2 if self.form.sees_source else 1)
        return f"{system}<|im_start|>user\n{pictures}{words}<|im_end|>\n<|im_start|>assistant\n"

    def ids(self, prompts: list[str], text: str, image_tokens: int) -> tuple[Any, Any]:
        """Right-padded ids and mask."""
        import torch

        tokenizer = real_tokenizer()
        rows = [tokenizer.encode(self.chat(text, prompt, image_tokens)).ids for prompt in prompts]
        ids = torch.full((len(rows), max(map(len, rows))), 151643)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
        return ids, mask

    def patches(self, images: Any, size: tuple[int, int]) -> Any:
        """(b · n, p) of pictures (b, h, w, 3) in [-1, 1], differentiable."""
        import torch

        vision = self.model.config.vision_config
        side = vision.patch_size
        pixels = resized(images, size)
        mean, std = (torch.tensor(x).reshape(1, 3, 1, 1) for x in (self.form.rule.mean, self.form.rule.std))
        batch, (height, width) = len(images), size
        cut = ((pixels - mean) / std).reshape(
            batch, 3, height // side // 2, 2, side, width // side // 2, 2, side
        )  # fmt: skip
        cut = cut.permute(0, 2, 5, 3, 6, 1, 4, 7)[:, :, :, :, :, :, None].expand(-1, -1, -1, -1, -1, -1, 2, -1, -1)
        return cut.reshape(batch, -1, 3 * 2 * side * side)

    def outputs(self, prompts: list[str], pictures: list[Any], size: tuple[int, int]) -> Any:
        """(b, h, 2) as the released forward passes compute them."""
        import torch

        vision = self.model.config.vision_config
        rows, columns = size[0] // vision.patch_size, size[1] // vision.patch_size
        patches = torch.stack([self.patches(picture, size) for picture in pictures], 1)
        pixels = patches.reshape(-1, patches.shape[-1])
        grid = torch.tensor([[1, rows, columns]] * (len(prompts) * len(pictures)))
        found = []
        for text, head in zip(self.form.texts, self.heads, strict=True):
            ids, mask = self.ids(prompts, text, rows * columns // 4)
            states = self.states(ids, mask, pixels, grid)
            found.append(head(states)[ids == ROWS - 1])
        return torch.stack(found, 1)

    def states(self, ids: Any, mask: Any, pixels: Any, grid: Any) -> Any:
        if version() < (5,):
            return self.older_states(ids, mask, pixels, grid)
        model = self.model.model
        is_image = ids == IDS["image_token_id"]
        if self.form.positions == "grid":
            inputs = {"pixel_values": pixels, "image_grid_thw": grid, "mm_token_type_ids": is_image.int()}
            return model(input_ids=ids, attention_mask=mask, **inputs).last_hidden_state
        embedded = self.model.get_input_embeddings()(ids)
        seen = model.visual(pixels, grid_thw=grid).pooler_output
        embedded = embedded.masked_scatter(is_image[..., None].expand_as(embedded), seen)
        return model.language_model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).last_hidden_state

    def older_states(self, ids: Any, mask: Any, pixels: Any, grid: Any) -> Any:
        """As the released code asks transformers 4, call for call: the first entry of what the inner model returns."""
        model = self.model
        if self.form.positions == "grid":  # EditReward on Qwen3-VL
            return model.model(input_ids=ids, attention_mask=mask, pixel_values=pixels, image_grid_thw=grid)[0]
        embedded = model.get_input_embeddings()(ids)
        seen = model.visual(pixels, grid_thw=grid)
        is_image = (ids == IDS["image_token_id"])[..., None].expand_as(embedded)
        embedded = embedded.masked_scatter(is_image, seen)
        return model.model(input_ids=None, attention_mask=mask, inputs_embeds=embedded)[0]


def small_form(kind: str) -> Form:
    """How the judge asks, with the area of pictures that the small models take."""
    rule = CASES[kind][2].rule
    rule = dataclasses.replace(rule, min_px=112**2, max_px=min(rule.max_px, 112**2 + 4000))
    return dataclasses.replace(CASES[kind][2], rule=rule)


def shown_pictures() -> tuple[np.ndarray, np.ndarray]:
    """Pictures to judge and the sources that they were edited from."""
    return random_pictures(2, *SHOWN), random_pictures(2, *SHOWN, seed=1)


def record(kind: str, folder: Path) -> None:
    """Writes a judge made under the transformers that runs, what it says, and from which side of the final norm.

    The latter as the largest distance of what its heads read from the norm's input, and from its output.
    """
    import torch
    import transformers

    oracle, seen = Oracle.of(CASES[kind][0], small_form(kind)), {}
    oracle.save(folder, old_names=False)
    tower = getattr(oracle.model.model, "language_model", oracle.model.model)
    tower.norm.register_forward_hook(lambda module, args, output: seen.update(before=args[0], after=output))
    for head in oracle.heads:
        head.register_forward_pre_hook(lambda module, args: seen.update(read=args[0]))
    images, source = (torch.from_numpy(x) for x in shown_pictures())
    vision = oracle.model.config.vision_config
    size = oracle.form.rule.size(*SHOWN, SimpleNamespace(patch_size=vision.patch_size, spatial_merge_size=2))
    with torch.no_grad():
        outputs = oracle.outputs(PROMPTS, [source, images] if oracle.form.sees_source else [images], size).numpy()
    distances = [float((seen["read"] - seen[side]).abs().max()) for side in ("before", "after")]
    np.savez(folder / "said.npz", outputs=outputs, distances=distances, version=transformers.__version__)


def resized(images: Any, size: tuple[int, int]) -> Any:
    """(b, 3, H, W) in [0, 1] of pictures (b, h, w, 3) in [-1, 1], in PIL's two passes."""
    import torch

    pixels = ((images + 1) / 2).clamp(0, 1).permute(0, 3, 1, 2)
    for shape in ((images.shape[1], size[1]), size):
        pixels = torch.nn.functional.interpolate(pixels, shape, mode="bicubic", antialias=True).clamp(0, 1)
    return pixels


@functools.cache
def real_tokenizer() -> Any:
    """With the special token, and special tokens read in text: what the released code does."""
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_files() / "tokenizer.json"))
    tokenizer.add_special_tokens([REWARD_TOKEN])
    return tokenizer


@functools.cache
def judge_tokenizer() -> JudgeTokenizer:
    return JudgeTokenizer(tokenizer_files() / "tokenizer.json")


def random_pictures(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth random pictures with some values beyond [-1, 1], as decoders give."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(-1.1, 1.1, (count, height // 8 + 1, width // 8 + 1, 3)).repeat(8, 1).repeat(8, 2)
    fine = 0.1 * rng.standard_normal((count, height, width, 3))
    return (coarse[:, :height, :width] + fine).astype(np.float32)
