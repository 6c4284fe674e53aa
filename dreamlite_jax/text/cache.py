"""Remembering encoded prompts: training repeats captions, and guidance asks for the null prompt every time."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from PIL import Image

from dreamlite_jax.config import TextConfig
from dreamlite_jax.errors import UserError
from dreamlite_jax.text import load
from dreamlite_jax.text.encoder import PromptEncoder, PromptRequest, PromptStates, stack_states

Key = tuple[str, str, str]


def image_sha256(image: Image.Image | None) -> str:
    """The sha256 of a picture's mode, size and pixels, in hexadecimal; the empty string without a picture."""
    if image is None:
        return ""
    digest = hashlib.sha256(f"{image.mode} {image.width}x{image.height} ".encode())
    digest.update(image.tobytes())
    return digest.hexdigest()


def load_remembering(config: TextConfig, directory: str | Path = ".", mesh: Mesh | None = None) -> "CachedEncoder":
    """The encoder of a config with a memory: of many prompts where words are all it reads, of few where pictures count.

    Args:
      directory, mesh: see `load.load_encoder`, whose errors these are.
    """
    words_only = config.encoder == "minilm"
    encoder = load.load_encoder(config, directory, mesh=mesh)
    return CachedEncoder(encoder, 50_000 if words_only else 64, image_in_key=not words_only)


class CachedEncoder:
    """A `PromptEncoder` around another that encodes every distinct prompt once while it is remembered.

    Rows are kept on the host without their padding and handed out as copies. The least recently used go first.

    Args:
        encoder: the encoder asked for what is not remembered, once per batch, with the distinct new prompts alone.
        capacity: prompts remembered. One of 16 tokens and width 384 takes 25 KB, one of 300 and 2048 takes 2.5 MB.
        image_in_key: whether the picture is part of what makes a prompt distinct. False is right for an encoder that
            reads only words (`MiniLMEncoder`), and saves encoding the same words again for every picture.
    """

    def __init__(self, encoder: PromptEncoder, capacity: int = 4096, *, image_in_key: bool = True):
        if capacity < 1:
            raise UserError(f"capacity is {capacity}; it must be a positive number of prompts")
        self.encoder = encoder
        self.hidden_dim = encoder.hidden_dim
        self.buckets = encoder.buckets
        self.null_tail = encoder.null_tail
        self._capacity = capacity
        self._image_in_key = image_in_key
        self._rows: OrderedDict[Key, np.ndarray] = OrderedDict()
        self._lock = threading.Lock()  # an app answers from several threads

    def __len__(self) -> int:
        """Prompts remembered now."""
        return len(self._rows)

    def key(self, request: PromptRequest) -> Key:
        """What makes a prompt distinct: task, text, and the digest of its picture."""
        return request.task, request.text, image_sha256(request.image) if self._image_in_key else ""

    def encode(self, requests: Sequence[PromptRequest], length: int | None = None) -> PromptStates:
        """As the wrapped encoder's `encode`: the same states, mask, padded length and errors."""
        keys = [self.key(request) for request in requests]
        with self._lock:
            found = {key: self._rows[key] for key in keys if key in self._rows}
            new = {key: request for key, request in zip(keys, requests, strict=True) if key not in found}
            if new:
                found.update(zip(new, self._encode(list(new.values()), length), strict=True))
            for key in keys:
                self._rows[key] = found[key]
                self._rows.move_to_end(key)
            while len(self._rows) > self._capacity:
                self._rows.popitem(last=False)
        return stack_states([found[key] for key in keys], self.hidden_dim, self.buckets, length)

    def _encode(self, requests: Sequence[PromptRequest], length: int | None) -> list[np.ndarray]:
        """The states of prompts not remembered, without padding: (tokens, d) each."""
        states, mask = self.encoder.encode(requests, length)
        counts = np.asarray(mask).sum(axis=1).astype(int)
        return [np.array(row[:count]) for row, count in zip(np.asarray(states), counts, strict=True)]
