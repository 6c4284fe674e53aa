"""Words to token ids for the MiniLM encoder, by the `tokenizers` library alone (transformers is not needed)."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dreamlite_jax.errors import UserError
from dreamlite_jax.models.minilm import minilm_file
from dreamlite_jax.text import words
from dreamlite_jax.text.words import open_tokenizer


class TokenBatch(NamedTuple):
    """Padded token ids (int32) and their mask (1 for a token, 0 for padding), as host arrays."""

    token_ids: Int[np.ndarray, "b s"]
    mask: Float[np.ndarray, "b s"]


class MiniLMTokenizer:
    """BERT's uncased WordPiece with [CLS] and [SEP] around the text, from the tokenizer.json beside the weights.

    The file asks for cutting and padding at 128 tokens; both are switched off.
    A prompt is plain text: "[SEP]" or "[MASK]" typed by a user are spelt out and not taken for the special tokens.
    """

    def __init__(self, directory: str | Path | None = None):
        path = minilm_file("tokenizer.json", directory)
        self._tokenizer = open_tokenizer(path, "MiniLM")
        self._tokenizer.encode_special_tokens = True
        pad_id = self._tokenizer.token_to_id("[PAD]")
        if pad_id is None:
            raise UserError(f"{path} has no [PAD] token; it is not a BERT tokenizer")
        self.pad_id: int = pad_id

    @property
    def vocab_size(self) -> int:
        """The number of tokens, which must not be above the rows of the encoder's embedding."""
        return self._tokenizer.get_vocab_size()

    def unread(self, prompt: str) -> str:
        """See `words.unread`."""
        return words.unread(self._tokenizer, prompt)

    def token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of each text, [CLS] and [SEP] included, neither cut nor padded. The empty text has two."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]

    def pad(self, ids: Sequence[Sequence[int]], length: int, rows: int | None = None) -> TokenBatch:
        """Pads to `length` tokens, and with rows of padding alone to `rows`.

        Raises:
            UserError: a text has more than `length` tokens, or there are more texts than `rows`.
        """
        rows = len(ids) if rows is None else rows
        if len(ids) > rows:
            raise UserError(f"{len(ids)} texts do not fit into {rows} rows")
        token_ids = np.full((rows, length), self.pad_id, np.int32)
        mask = np.zeros((rows, length), np.float32)
        for i, row in enumerate(ids):
            if len(row) > length:
                raise UserError(f"the prompt has {len(row)} tokens and the limit is {length}; shorten it")
            token_ids[i, : len(row)] = row
            mask[i, : len(row)] = 1.0
        return TokenBatch(token_ids, mask)
