"""What a text encoder is to the rest of the project: prompts in, padded token states and their mask out."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from PIL import Image

from dreamlite_jax.errors import UserError
from dreamlite_jax.text import templates
from dreamlite_jax.text.templates import Task


@dataclasses.dataclass(frozen=True)
class PromptRequest:
    """One prompt to encode.

    Attributes:
        task: what is asked for; "null" is the unconditional prompt of classifier-free guidance.
        text: the bare prompt, without tag; stripped and checked here (`templates.clean_prompt`).
        image: the source of an edit. A null prompt has one in the branches of edit guidance that keep the picture.

    Raises:
        UserError: the text does not suit the task, or a picture comes with task generate, which has no use for it.
    """

    task: Task
    text: str
    image: Image.Image | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", templates.clean_prompt(self.task, self.text))
        if self.task == "generate" and self.image is not None:
            raise UserError("task generate takes no image; to change a picture use task edit")

    @property
    def user_text(self) -> str:
        """The words the encoder reads, with the tag of the task."""
        return templates.user_text(self.task, self.text)


class PromptStates(NamedTuple):
    """Encoded prompts, as host arrays. Tokens come first in every row, and states beyond the mask are exactly zero."""

    states: Float[np.ndarray, "b s d"]
    mask: Float[np.ndarray, "b s"]


class PromptTooLong(UserError):
    """A prompt has more tokens than may be; nothing is ever cut off silently."""


@runtime_checkable
class PromptEncoder(Protocol):
    """An encoder of prompts.

    Attributes:
        hidden_dim: d, the width of a state.
        buckets: the padded lengths in tokens it chooses from, ascending; the last is the longest prompt it takes.
        null_tail: 0 where the null prompt is the same for all. Where the null prompt of an edit has its picture: how
            many of its last states are its own. Those before are the first of every prompt with that picture.
    """

    hidden_dim: int
    buckets: tuple[int, ...]
    null_tail: int

    def encode(self, requests: Sequence[PromptRequest], length: int | None = None) -> PromptStates:
        """Encodes a batch of any size, padded to `length` tokens or else to the smallest bucket that holds all of it.

        Raises:
            UserError: a prompt has more tokens than `length` or the last bucket. Nothing is ever cut off silently.
        """
        ...


class NullTails(NamedTuple):
    """What the null prompts of a batch have of their own; see `PromptEncoder.null_tail`.

    Attributes:
        states: zeros where a prompt has no picture.
        start: where they begin among the null prompt's states; -1 where a prompt has no picture.
    """

    states: Float[np.ndarray, "b t d"]
    start: Float[np.ndarray, "b"]


def null_tails(encoder: PromptEncoder, requests: Sequence[PromptRequest]) -> NullTails:
    """Encodes the null prompts of those requests that have a picture, for an encoder that looks at them."""
    tail = encoder.null_tail
    found = NullTails(
        np.zeros((len(requests), tail, encoder.hidden_dim), np.float32), np.full(len(requests), -1, np.float32)
    )
    rows = [i for i, request in enumerate(requests) if request.image is not None]
    nulls = encoder.encode([PromptRequest("null", "", requests[i].image) for i in rows])
    for i, states, mask in zip(rows, nulls.states, nulls.mask, strict=True):
        end = int(mask.sum())
        found.states[i], found.start[i] = states[end - tail : end], end - tail
    return found


def checked_buckets(buckets: Sequence[int]) -> tuple[int, ...]:
    """The buckets as a tuple; a UserError unless they are positive and ascending."""
    buckets = tuple(buckets)
    if not buckets or buckets[0] < 1 or any(a >= b for a, b in itertools.pairwise(buckets)):
        raise UserError(f"buckets are {buckets}; they must be positive and ascending, such as (16, 32, 48, 64)")
    return buckets


def check_token_count(count: int, limit: int, text: str) -> None:
    """Refuses a prompt of more tokens than the limit, naming both and the prompt's first words."""
    if count > limit:
        start = text if len(text) <= 80 else text[:77] + "..."
        raise PromptTooLong(f"the prompt has {count} tokens and the limit is {limit}: {start!r}; shorten it")


def bucket_length(count: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `count` tokens, so that a new prompt length seldom means a new compilation.

    Raises:
        UserError: no bucket is long enough.
    """
    for bucket in buckets:
        if count <= bucket:
            return bucket
    raise PromptTooLong(f"the prompt has {count} tokens and the limit is {buckets[-1]}; shorten it")


def stack_states(
    rows: Sequence[Float[np.ndarray, "_ d"]], hidden_dim: int, buckets: Sequence[int], length: int | None = None
) -> PromptStates:
    """Pads rows of token states, (tokens, d) each, to one length: `length`, or the smallest bucket that holds them all.

    Raises:
        UserError: a row has more tokens than that, or `length` is not positive.
    """
    longest = max((len(row) for row in rows), default=0)
    if length is None:
        length = bucket_length(longest, buckets)
    elif length < 1:
        raise UserError(f"length is {length}; it must be a positive number of tokens")
    elif longest > length:
        raise PromptTooLong(f"the prompt has {longest} tokens and the limit is {length}; shorten it")
    states = np.zeros((len(rows), length, hidden_dim), np.float32)
    mask = np.zeros((len(rows), length), np.float32)
    for i, row in enumerate(rows):
        states[i, : len(row)] = row
        mask[i, : len(row)] = 1.0
    return PromptStates(states, mask)
