"""The small default prompt encoder: MiniLM-L6 over the same user texts as the large one."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from dreamlite_jax.errors import UserError
from dreamlite_jax.models import minilm
from dreamlite_jax.text.encoder import (
    PromptRequest,
    PromptStates,
    bucket_length,
    check_token_count,
    checked_buckets,
    stack_states,
)
from dreamlite_jax.text.tokenizers import MiniLMTokenizer


class MiniLMEncoder:
    """A `PromptEncoder` of hidden_dim 384 that runs in milliseconds and is compiled once per bucket.

    The picture of an edit request is accepted and not looked at: the U-Net sees the source in its condition panel, and
    this encoder gives it the words alone.

    Every prompt is computed in its own bucket and in chunks of a fixed number of rows, so its states are the same bits
    whatever else is in the batch, and whatever length the batch is padded to.

    Args:
        params: the parameter tree of `MiniLM`; None loads the released weights (`load_minilm`).
        max_length: the longest prompt taken, in tokens, tag and [CLS], [SEP] included.
        buckets: padded lengths to compile for; those above `max_length` are left out, and it is itself one.
        directory: folder of config, weights and tokenizer; None is the installed package.
        chunk: rows computed at a time. A single prompt costs as much as a full chunk.

    Raises:
        UserError: the package or a file is missing, or lengths are out of range.
    """

    null_tail = 0

    def __init__(
        self,
        params: minilm.Params | None = None,
        max_length: int = 64,
        buckets: Sequence[int] = (16, 32, 48, 64),
        *,
        directory: str | Path | None = None,
        chunk: int = 16,
    ):
        config = minilm.read_config(directory)
        if not 1 <= max_length <= config.max_position_embeddings:
            raise UserError(f"max_length is {max_length}; it must be from 1 to {config.max_position_embeddings} tokens")
        if chunk < 1:
            raise UserError(f"chunk is {chunk}; it must be a positive number of rows")
        self.buckets = (*(b for b in checked_buckets(buckets) if b < max_length), max_length)
        self.max_length = max_length
        self.hidden_dim = config.hidden_size
        self.directory = directory
        self.tokenizer = MiniLMTokenizer(directory)
        if self.tokenizer.vocab_size > config.vocab_size:
            raise UserError(f"the tokenizer has {self.tokenizer.vocab_size} tokens, the weights {config.vocab_size}")
        if params is None:
            _, params = minilm.load_minilm(directory)
        self._params = jax.device_put(params)
        self._chunk = chunk
        model = minilm.MiniLM(config)

        def states(params, token_ids, mask):
            # Full precision everywhere: states made on a TPU must serve a model that is sampled on a laptop.
            with jax.default_matmul_precision("highest"):
                return model.apply({"params": params}, token_ids, mask)

        self._states = jax.jit(states)

    def encode(self, requests: Sequence[PromptRequest], length: int | None = None) -> PromptStates:
        """Encodes a batch of any size.

        Args:
            requests: b prompts.
            length: tokens to pad to; None takes the smallest bucket that holds the batch.

        Returns:
            states (b, length, 384) and mask (b, length), float32 host arrays; states beyond the mask are zero.

        Raises:
            UserError: a prompt has more tokens than `length` or `max_length`.
        """
        texts = [request.user_text for request in requests]
        ids = self.tokenizer.token_ids(texts)
        limit = self.max_length if length is None else min(length, self.max_length)
        for row, text in zip(ids, texts, strict=True):
            check_token_count(len(row), limit, text)

        running = []  # all chunks are sent off before the first result is waited for
        for bucket, members in self._chunks(ids):
            batch = self.tokenizer.pad([ids[i] for i in members], bucket, self._chunk)
            running.append((members, self._states(self._params, *jax.device_put(tuple(batch)))))
        rows: dict[int, np.ndarray] = {}
        for members, states in running:
            host = jax.device_get(states)
            rows.update((i, host[j, : len(ids[i])]) for j, i in enumerate(members))
        return stack_states([rows[i] for i in range(len(ids))], self.hidden_dim, self.buckets, length)

    def _chunks(self, ids: Sequence[Sequence[int]]) -> Iterator[tuple[int, list[int]]]:
        """(bucket, indices of at most `chunk` prompts that belong into it), together every prompt once."""
        groups = defaultdict(list)
        for i, row in enumerate(ids):
            groups[bucket_length(len(row), self.buckets)].append(i)
        for bucket, members in groups.items():
            for start in range(0, len(members), self._chunk):
                yield bucket, members[start : start + self._chunk]
