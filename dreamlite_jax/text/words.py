"""Words of a prompt that its encoder cannot read, found before anything is drawn. No JAX here, for the runtime."""

import itertools
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from dreamlite_jax.errors import UserError

SHOWN = 6  # words quoted in a line
LONGEST = 24  # characters of a word that are quoted


class UnreadWords(UserWarning):
    """A prompt has words that its encoder does not know, and others that it does."""


def open_tokenizer(path: str | Path, owner: str) -> tokenizers.Tokenizer:
    """The tokenizer.json at `path`, which neither cuts nor pads: the length is the encoder's business.

    Raises:
      UserError: no such file (`owner` says whose it would be), or not a tokenizer.
    """
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; it is the tokenizer of {owner}")
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path} is not a tokenizer.json: {error}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def unread(tokenizer: tokenizers.Tokenizer, prompt: str) -> str:
    """One line about the words of a prompt that have no token, or only those of their letters; "" where all have.

    The second are words in another script than Latin: WordPiece's vocabulary has the letters of many, but the words of
    English. A tokenizer of bytes, such as Qwen's, reads everything.

    Args:
      prompt: the bare words, without the tag of a task.

    Raises:
      UserError: nothing that could be drawn is left of the prompt.
    """
    unknown_token = tokenizer.model.unk_token
    if unknown_token is None:
        return ""
    encoding = tokenizer.encode(prompt, add_special_tokens=False)
    unknown, spelt, known = [], [], False
    pieces = zip(encoding.word_ids, encoding.tokens, encoding.offsets, strict=True)
    for _, group in itertools.groupby(pieces, key=lambda piece: piece[0]):
        _, tokens, offsets = zip(*group, strict=True)
        word = prompt[offsets[0][0] : offsets[-1][1]]
        if unknown_token in tokens:
            unknown.append(word)
            continue
        known = known or any(character.isalnum() for character in word)
        if len(tokens) > 1 and any(map(_is_foreign, word)):
            spelt.append(word)
    if not encoding.tokens or (unknown and not known):
        raise UserError(
            f"the text encoder knows none of the prompt's words: {_quoted(unknown or [prompt])}; write it in English"
        )
    said = []
    if unknown:
        said.append(f"does not know {_quoted(unknown)}, so the picture is drawn without")
    if spelt:
        said.append(f"has only the letters of {_quoted(spelt)}, not the meaning")
    return f"the text encoder {', and '.join(said)}; write it in English" if said else ""


def _is_foreign(character: str) -> bool:
    return character.isalpha() and not unicodedata.name(character, "").startswith("LATIN")


def _quoted(words: Sequence[str]) -> str:
    words = list(dict.fromkeys(words))
    shown = [repr(word if len(word) <= LONGEST else word[: LONGEST - 1] + "…") for word in words[:SHOWN]]
    return ", ".join(shown) + (f" and {len(words) - SHOWN} more" if len(words) > SHOWN else "")
