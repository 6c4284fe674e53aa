"""The released judges as rewards: HPSv3 for generation, EditReward for edits."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from dreamlite_jax.errors import UserError
from dreamlite_jax.models.qwen_vl import rope
from dreamlite_jax.models.qwen_vl.model import STACKED
from dreamlite_jax.parallel import sharding
from dreamlite_jax.rewards import prompts
from dreamlite_jax.rewards.base import Context
from dreamlite_jax.rewards.images import CLIP_448, NATIVE, PictureRule
from dreamlite_jax.rewards.network import RewardNetwork
from dreamlite_jax.text.tokenizers import open_tokenizer
from dreamlite_jax.types import Image, PerSample

IMAGE_MARK = ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>")


@dataclasses.dataclass(frozen=True)
class Form:
    """How a released judge asks its base model.

    Attributes:
      texts: one a head, with {} where the prompt goes.
      sees_source: whether the source comes before the picture.
      system: the system turn of the base model's chat template; "" where it writes none.
      positions: of image tokens: "flat" counts them like words, because the released code hands the language model
        embeddings alone, which drops the grid; "grid" is the base model's own row and column.
      rule: of pictures.
      frame_tokens: at least as many as the chat and the longest text have without prompt and pictures.
    """

    texts: tuple[str, ...]
    sees_source: bool
    system: str
    positions: Literal["flat", "grid"]
    rule: PictureRule
    frame_tokens: int


EDIT_TEXTS = (prompts.EDIT_FOLLOWING, prompts.EDIT_QUALITY)
QWEN = "You are a helpful assistant."
MIMO = "You are MiMo, an AI assistant developed by Xiaomi."
HPSV3 = Form((prompts.HPSV3,), False, QWEN, "flat", CLIP_448, 528)
EDIT_REWARD = {
    "qwen2_5_vl_7b": Form(EDIT_TEXTS, True, QWEN, "flat", CLIP_448, 424),
    "mimo_vl_7b": Form(EDIT_TEXTS, True, MIMO, "flat", CLIP_448, 424),
    "qwen3_vl_8b": Form(EDIT_TEXTS, True, "", "grid", NATIVE, 424),
}


class JudgeTokenizer:
    """The base model's tokenizer with the special token of the released judges added to its end.

    Words of a prompt are plain text: a typed "<|im_end|>" or "<|Reward|>" is spelt out.

    Raises:
      UserError: there is no tokenizer.json, or it lacks a token of the chat.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        self._tokenizer = open_tokenizer(path, "the judge's base model")
        self._tokenizer.add_special_tokens([prompts.REWARD_TOKEN])
        self._tokenizer.encode_special_tokens = True
        self.path = path

    @property
    def size(self) -> int:
        """Tokens with the special one: the rows of the judge's embedding."""
        return self._tokenizer.get_vocab_size()

    def special(self, token: str) -> int:
        found = self._tokenizer.token_to_id(token)
        if found is None:
            raise UserError(f"{self.path} has no token {token}; it must be the tokenizer of the judge's base model")
        return found

    def words(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).ids

    def text(self, form: Form, text: str, prompt: str, image_tokens: int) -> list[int]:
        """One text with the prompt in place, from the chat's beginning to the token that is judged."""
        start, end = self.special("<|im_start|>"), self.special("<|im_end|>")
        ids = [start, *self.words(f"system\n{form.system}"), end, *self.words("\n")] if form.system else []
        vision_start, image, vision_end = map(self.special, IMAGE_MARK)
        picture = [vision_start, *[image] * image_tokens, vision_end]
        ids += [start, *self.words("user\n"), *picture * (2 if form.sees_source else 1)]
        before, after = text.split("{}")
        return [*ids, *self.words(before + prompt + after + prompts.REQUEST), self.special(prompts.REWARD_TOKEN)]


class Judge:
    """A released judge; a `Reward` whose score is the mean over its heads of each one's first output.

    Args:
      network, params: from `load.load_judge`. On a mesh (`jax.set_mesh`) activations stay with their pictures, and
        parameters that are split over fsdp are gathered when they are used, those of a stack layer by layer.
      form: how it was trained.
      tokenizer: None makes a judge that can be compiled but not asked: `prepare` takes no prompts then.
      height, width: of the pictures that it will be shown, pixels.
      prompt_tokens: of the longest prompt; shapes follow from it.
    """

    def __init__(
        self,
        network: RewardNetwork,
        params: Any,
        form: Form,
        tokenizer: JudgeTokenizer | None,
        *,
        height: int,
        width: int,
        prompt_tokens: int = 256,
    ):
        self.network, self.params, self.form, self.tokenizer = network, params, form, tokenizer
        self.height, self.width, self.prompt_tokens = height, width, prompt_tokens
        vision = network.config.vision
        seen_height, seen_width = form.rule.size(height, width, vision)
        self.grid: rope.Grid = (seen_height // vision.patch_size, seen_width // vision.patch_size)
        self.image_tokens = self.grid[0] * self.grid[1] // vision.merge_unit
        pictures = 2 if form.sees_source else 1
        self.length = pictures * (self.image_tokens + 2) + form.frame_tokens + prompt_tokens

    def prepare(self, prompts: Sequence[str]) -> Mapping[str, np.ndarray]:
        """ids and mask (b, h, s) and positions (b, h, 3, s) of the h texts of each prompt."""
        shape = (len(prompts), len(self.form.texts), self.length)
        ids, mask = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        for i, prompt in enumerate(prompts):
            for j, text in enumerate(self.form.texts):
                row = self.tokenizer.text(self.form, text, prompt, self.image_tokens)
                if len(row) > self.length:
                    words = len(self.tokenizer.words(prompt))
                    raise UserError(
                        f"the prompt has {words} tokens; the judge was set up for {self.prompt_tokens} (prompt_tokens)"
                    )
                ids[i, j, : len(row)], mask[i, j, : len(row)] = row, 1
        return {"ids": ids, "mask": mask, "positions": self.positions(ids, mask)}

    def positions(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """(b, h, 3, s) int32 positions as the form has them."""
        config, flat = self.network.config, (-1, self.length)
        if self.form.positions == "flat":
            found = rope.text_positions(mask.reshape(flat))
        else:
            merge = config.vision.spatial_merge_size
            found = rope.multimodal_positions(
                ids.reshape(flat), mask.reshape(flat), config.image_token_id, self.grid, merge
            )
        return np.moveaxis(found, 0, 1).reshape(*ids.shape[:2], 3, self.length)

    def __call__(self, params: Any, images: Image, context: Context) -> PerSample:
        return self.outputs(params, images, context)[:, :, 0].mean(1)

    def outputs(self, params: Any, images: Image, context: Context) -> jax.Array:
        """(b, h, 2) mean and log deviation by each head."""
        if images.shape[1:3] != (self.height, self.width):
            raise UserError(
                f"pictures are {images.shape[2]} x {images.shape[1]}; the judge was set up for "
                f"{self.width} x {self.height} (size_px)"
            )
        pictures = [context.source, images] if self.form.sees_source else [images]
        patches = [self.form.rule.patches(picture, self.network.config.vision) for picture in pictures]
        tokens = context.tokens
        inputs = (tokens["ids"], tokens["mask"], tokens["positions"], patches)
        network = self.network.clone(sharding=sharding.activations())
        return network.apply({"params": gathered_but_stacks(jax.lax.stop_gradient(params))}, *inputs, self.grid)


def gathered_but_stacks(params: Any) -> Any:
    """Parameters whole on every device, but for those that a scan takes layer by layer."""

    def whole(path: tuple, x: Any) -> Any:
        return x if any(key.key in STACKED for key in path) else sharding.gathered(x)

    return jax.tree_util.tree_map_with_path(whole, params)
