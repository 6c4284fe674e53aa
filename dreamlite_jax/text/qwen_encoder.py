"""The prompt encoder of the released weights: the states of Qwen3-VL's last layer of a chat, without the template's
beginning.

Oracle: diffusers `DreamLitePipeline.encode_prompt` (the mobile pipeline has the same), which reads `hidden_states[-1]`.
Its weights were trained with transformers 4.57.3, where that is the state before the model's final norm; under
transformers 5 the same pipeline reads the state after it, and its pictures show blocks.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from dreamlite_jax.config import TextState
from dreamlite_jax.errors import UserError
from dreamlite_jax.models.qwen_vl import rope
from dreamlite_jax.models.qwen_vl.load import load_qwen_vl
from dreamlite_jax.models.qwen_vl.model import QwenVL
from dreamlite_jax.text.encoder import (
    PromptRequest,
    PromptStates,
    bucket_length,
    check_token_count,
    checked_buckets,
    stack_states,
)
from dreamlite_jax.text.qwen_inputs import PictureInputs, QwenTokenizer, read_picture_inputs
from dreamlite_jax.text.templates import EDIT_CHAT, GENERATE_CHAT, ChatTemplate

GENERATE_TOKENS = 200  # states kept of a chat without a picture (`max_sequence_length` of the pipeline)
BUCKETS = (64, 128, GENERATE_TOKENS, 320, 384, 448, 512)


class Prompt(NamedTuple):
    """A request as the model reads it."""

    ids: list[int]
    chat: ChatTemplate
    bucket: int  # padded number of kept states

    @property
    def kept(self) -> int:
        """States that remain once the template's beginning is dropped."""
        return len(self.ids) - self.chat.dropped_tokens


class QwenEncoder:
    """A `PromptEncoder` of Qwen3-VL, compiled once per bucket and task with or without a picture.

    Limits: a prompt to generate has at most 200 tokens, tag included. The pipeline keeps 200 states in all and cuts the
    rest off silently; here the same 200 are kept, so between 196 and 200 tokens the template's closing words are cut as
    there, but a prompt that would lose words of its own is refused. The pipeline has no limit for edits; here the last
    bucket is the limit, 263 of its states being picture and template: 512 leaves 249 tokens, a longer one more.

    Prompts of one bucket run together, in rows of a power of two up to `chunk`.

    Args:
        model, params: from `load_qwen_vl`.
        tokenizer: checked against the weights.
        pictures: how sources become patches.
        buckets: numbers of states to compile for; the last is the longest taken.
        chunk: most rows computed at a time.
        mesh: the one the parameters are on, if any; rows are spread over its devices.

    Raises:
        UserError: buckets are out of order, or `chunk` is not a positive power of two.
    """

    null_tail = EDIT_CHAT.closing_tokens

    def __init__(
        self,
        model: QwenVL,
        params: Any,
        tokenizer: QwenTokenizer,
        pictures: PictureInputs,
        *,
        buckets: Sequence[int] = BUCKETS,
        chunk: int = 16,
        mesh: Mesh | None = None,
    ):
        if chunk < 1 or chunk & (chunk - 1):
            raise UserError(f"chunk is {chunk}; it must be a power of two, such as 16")
        self.buckets = checked_buckets(buckets)
        self.hidden_dim = model.config.text.hidden_size
        self._model, self._params = model, params
        self._tokenizer, self._pictures = tokenizer, pictures
        self._rows_sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        self._least_rows = 1 if mesh is None else mesh.size
        self._chunk = chunk
        self._states = jax.jit(self._forward, static_argnames="dropped")

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        state: TextState = "before_norm",
        dtype: DTypeLike = jnp.bfloat16,
        mesh: Mesh | None = None,
        **options: Any,
    ):
        """The encoder of a diffusers folder (text_encoder/, tokenizer/, processor/) or of one transformers folder.

        Args:
            state: see `TextConfig`.
            dtype: of weights and computation; states are float32 in any case.
            options: `buckets` and `chunk` of the encoder.

        Raises:
            UserError: a file is missing or does not belong to the weights (see `QwenTokenizer`, `load_qwen_vl`).
        """
        folder = Path(folder)
        model, params = load_qwen_vl(weights_folder(folder), dtype=dtype, mesh=mesh, final_norm=state == "after_norm")
        tokenizer = QwenTokenizer(_find(folder, ("tokenizer", "processor"), ("tokenizer.json",)), model.config)
        settings = _find(folder, ("processor",), ("preprocessor_config.json", "processor_config.json"))
        pictures = read_picture_inputs(settings, model.config.vision)
        return cls(model, params, tokenizer, pictures, mesh=mesh, **options)

    def encode(self, requests: Sequence[PromptRequest], length: int | None = None) -> PromptStates:
        """Encodes a batch of any size, tasks mixed.

        A null request without a picture is the empty negative prompt of generation; with one, that of editing.

        Args:
            requests: b prompts; those of task edit have a picture.
            length: states to pad to; None takes the smallest bucket that holds the batch.

        Returns:
            states (b, length, hidden_dim) and mask (b, length), float32 host arrays; states beyond the mask are zero.

        Raises:
            UserError: an edit has no picture, or a prompt is too long (see the class) or has more states than `length`.
        """
        prompts = [self._prompt(request, length) for request in requests]
        rows: dict[int, np.ndarray] = {}
        running = []  # a chunk is prepared while the one before it runs
        for members in self._chunks(prompts):
            images = [requests[i].image for i in members]
            running.append((members, self._run([prompts[i] for i in members], images)))
        for members, states in running:
            host = jax.device_get(states)
            rows.update((i, host[j, : prompts[i].kept]) for j, i in enumerate(members))
        return stack_states([rows[i] for i in range(len(prompts))], self.hidden_dim, self.buckets, length)

    def _prompt(self, request: PromptRequest, length: int | None) -> Prompt:
        """The request as ids, within all limits."""
        if request.task == "edit" and request.image is None:
            raise UserError("task edit needs an image: this encoder reads the source together with the words")
        words = self._tokenizer.words(request.user_text)
        if request.image is None:
            check_token_count(len(words), GENERATE_TOKENS, request.user_text)
            ids = self._tokenizer.chat(GENERATE_CHAT, words)[: GENERATE_CHAT.dropped_tokens + GENERATE_TOKENS]
            chat = GENERATE_CHAT
        else:
            ids, chat = self._tokenizer.chat(EDIT_CHAT, words), EDIT_CHAT
        kept = len(ids) - chat.dropped_tokens
        limit = self.buckets[-1] if length is None else min(length, self.buckets[-1])
        check_token_count(len(words), len(words) + limit - kept, request.user_text)
        return Prompt(ids, chat, bucket_length(kept, self.buckets))

    def _chunks(self, prompts: Sequence[Prompt]) -> Iterator[list[int]]:
        """Indices of at most `chunk` prompts of one chat and bucket, together every prompt once."""
        groups = defaultdict(list)
        for i, prompt in enumerate(prompts):
            groups[prompt.chat, prompt.bucket].append(i)
        for members in groups.values():
            for start in range(0, len(members), self._chunk):
                yield members[start : start + self._chunk]

    def _run(self, prompts: Sequence[Prompt], images: Sequence[Any]) -> jax.Array:
        """Starts the model on prompts of one chat and bucket; rows beyond theirs are copies of the first."""
        rows = 1 << (len(prompts) - 1).bit_length()
        rows = -(-rows // self._least_rows) * self._least_rows
        chosen = [*range(len(prompts)), *[0] * (rows - len(prompts))]
        chat = prompts[0].chat
        ids = np.zeros((len(prompts), chat.dropped_tokens + prompts[0].bucket), np.int32)
        mask = np.zeros(ids.shape, np.int32)
        for i, prompt in enumerate(prompts):
            ids[i, : len(prompt.ids)], mask[i, : len(prompt.ids)] = prompt.ids, 1
        if chat is GENERATE_CHAT:
            positions, patches = rope.text_positions(mask), None
        else:
            config = self._model.config
            positions = rope.multimodal_positions(
                ids, mask, config.image_token_id, self._pictures.grid, config.vision.spatial_merge_size
            )
            patches = np.stack([self._pictures.patches(image) for image in images])[chosen, None]
        inputs = (ids[chosen], mask[chosen], np.moveaxis(positions[:, chosen], 0, 1), patches)
        return self._states(self._params, *jax.device_put(inputs, self._rows_sharding), dropped=chat.dropped_tokens)

    def _forward(self, params, ids, mask, positions, patches, *, dropped: int) -> jax.Array:
        grid = None if patches is None else self._pictures.grid
        # Full precision for float32: states made on a TPU must serve a model that is sampled on a laptop.
        with jax.default_matmul_precision("highest"):
            states = self._model.apply({"params": params}, ids, mask, jnp.moveaxis(positions, 1, 0), patches, grid)
        return states[:, dropped:].astype(jnp.float32)


def weights_folder(folder: Path) -> Path:
    """Where the weights are: in text_encoder/ of a diffusers folder, or in the folder itself."""
    return folder / "text_encoder" if (folder / "text_encoder").is_dir() else folder


def _find(folder: Path, inside: Sequence[str], names: Sequence[str]) -> Path:
    """The first existing file of these names, in these folders of a diffusers folder or in the folder itself."""
    places = [folder / sub / name for sub in inside for name in names] + [folder / name for name in names]
    for path in places:
        if path.is_file():
            return path
    raise UserError(f"none of {', '.join(map(str, places))} exists; one is needed beside the weights")
