"""What Qwen3-VL reads, made on the host: chat templates to token ids, source pictures to patches. No torch.

The released pipeline hands both to the Hugging Face processor, whose image part imports torch; the tests hold this one
equal to it.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dreamlite_jax.errors import UserError
from dreamlite_jax.json_files import read_json
from dreamlite_jax.models.qwen_vl.config import QwenVLConfig, VisionTowerConfig
from dreamlite_jax.models.qwen_vl.vision import patchify
from dreamlite_jax.text.templates import EDIT_CHAT, GENERATE_CHAT, ChatTemplate
from dreamlite_jax.text.tokenizers import open_tokenizer

SOURCE_PX = 512  # the source of an edit is squashed to this square, whatever its shape
IMAGE_MARK = "<|vision_start|><|image_pad|><|vision_end|>"


class QwenTokenizer:
    """Byte-level BPE of Qwen around the two chats of the released pipeline.

    Words of a user are plain text: a typed "<|im_end|>" is spelt out and cannot close the chat. (The pipeline would
    take it for the special token, and stop at a typed "<|image_pad|>".)

    Args:
        path: the tokenizer.json.
        config: of the model, whose special token ids it must share.

    Raises:
        UserError: no tokenizer, or one that does not belong to the weights: it cuts a template into another number of
            tokens than the pipeline drops, or has other ids for the image tokens. Either would ruin every image
            without any other sign.
    """

    def __init__(self, path: str | Path, config: QwenVLConfig):
        path = Path(path)
        self._tokenizer = open_tokenizer(path, "Qwen3-VL")
        self.image_tokens = (SOURCE_PX // config.vision.patch_size) ** 2 // config.vision.merge_unit
        self._chats = {chat: self._checked_chat(path, chat, config) for chat in (GENERATE_CHAT, EDIT_CHAT)}
        self._tokenizer.encode_special_tokens = True  # from here on only words of users
        largest = max(self._tokenizer.get_vocab().values())
        if largest >= config.text.vocab_size:
            raise UserError(f"{path} has token id {largest}; the weights have {config.text.vocab_size} embeddings")

    def words(self, text: str) -> list[int]:
        """Ids of the user text alone."""
        return self._tokenizer.encode(text).ids

    def chat(self, chat: ChatTemplate, words: Sequence[int]) -> list[int]:
        """Ids of the whole chat with the user's words in place, and one id for every token of its image."""
        before, after = self._chats[chat]
        return [*before, *words, *after]

    def _checked_chat(self, path: Path, chat: ChatTemplate, config: QwenVLConfig) -> tuple[list[int], list[int]]:
        before, after = chat.text.split("{}")
        has_image = before.endswith(IMAGE_MARK)
        dropped = self.words(before.removesuffix(IMAGE_MARK))
        if len(dropped) != chat.dropped_tokens:
            raise UserError(
                f"{path} cuts the part of a template that is dropped after encoding into {len(dropped)} tokens; the "
                f"weights were trained with {chat.dropped_tokens}; use the tokenizer of Qwen3-VL"
            )
        image = []
        if has_image:
            image = self.words(IMAGE_MARK)
            expected = [config.vision_start_token_id, config.image_token_id, config.vision_end_token_id]
            if image != expected:
                raise UserError(
                    f"{path} has the ids {image} for {IMAGE_MARK}; config.json of the weights says {expected}"
                )
            image = [image[0], *[image[1]] * self.image_tokens, image[2]]
        closing = self.words(after)
        if len(closing) != chat.closing_tokens:
            raise UserError(
                f"{path} cuts the end of a template into {len(closing)} tokens; Qwen3-VL's tokenizer makes "
                f"{chat.closing_tokens}"
            )
        return dropped + image, closing


@dataclasses.dataclass(frozen=True)
class PictureInputs:
    """How a source picture becomes patches (oracle: diffusers `VaeImageProcessor.resize`, `Qwen2VLImageProcessorPil`).

    Attributes:
        vision: patch sizes.
        mean, std: per channel, of pixels in 0..1.
    """

    vision: VisionTowerConfig
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        side = SOURCE_PX // self.vision.patch_size
        return side, side

    def patches(self, image: Image.Image) -> np.ndarray:
        """(n, patch_dim) float32 of any picture: squashed by LANCZOS, transparency over white, normalised."""
        pixels = np.asarray(over_white(image.resize((SOURCE_PX, SOURCE_PX), Image.Resampling.LANCZOS)))
        scaled = (pixels.astype(np.float64) * (1 / 255)).astype(np.float32)
        normalised = (scaled - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)
        return patchify(normalised[None], self.vision)[0]


def over_white(image: Image.Image) -> Image.Image:
    """The picture as RGB; what is transparent shows white."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (255, 255, 255, 255)), image).convert("RGB")


def read_picture_inputs(path: str | Path, vision: VisionTowerConfig) -> PictureInputs:
    """Settings of a processor's preprocessor_config.json (or processor_config.json, which holds the same inside).

    Raises:
        UserError: its patches are not those of the weights, or it would resize a 512 x 512 picture once more.
    """
    path = Path(path)
    settings = read_json(path)
    settings = settings.get("image_processor", settings)
    for key, ours in (
        ("patch_size", vision.patch_size),
        ("temporal_patch_size", vision.temporal_patch_size),
        ("merge_size", vision.spatial_merge_size),
    ):
        if settings.get(key, ours) != ours:
            raise UserError(f"{path}: {key} is {settings[key]}; config.json of the weights says {ours}")
    multiple = vision.patch_size * vision.spatial_merge_size
    if SOURCE_PX % multiple:
        raise UserError(
            f"{path}: the processor would resize a source of {SOURCE_PX} pixels a side to a multiple of patch_size x "
            f"merge_size, {multiple}; the released pipelines have patches of 16"
        )
    for key, ours in (("do_rescale", True), ("do_normalize", True), ("rescale_factor", 1 / 255)):
        if settings.get(key, ours) != ours:
            raise UserError(f"{path}: {key} is {settings[key]}; it must be {ours}")
    size = settings.get("size") or {}
    smallest = size.get("shortest_edge", settings.get("min_pixels")) or 0
    largest = size.get("longest_edge", settings.get("max_pixels")) or SOURCE_PX**2
    if not smallest <= SOURCE_PX**2 <= largest:
        raise UserError(
            f"{path}: size is {smallest} to {largest} pixels; it must allow {SOURCE_PX**2}, the squashed source"
        )
    channels = {key: tuple(settings[f"image_{key}"]) for key in ("mean", "std") if f"image_{key}" in settings}
    if any(len(values) != vision.in_channels for values in channels.values()):
        raise UserError(f"{path}: image_mean and image_std must have {vision.in_channels} values; they are {channels}")
    return PictureInputs(vision, **channels)
