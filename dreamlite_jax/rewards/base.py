"""What a reward is, and the weighted sum of several.

A reward has a host part, `prepare`, which turns prompts into arrays of fixed shapes once (in the input pipeline), and a
device part, the call, which is pure in parameters and pictures and so can be jitted, sharded and differentiated:

    tokens = reward.prepare(["a red cat", …])                                    # numpy, leading axis b
    scores = jax.jit(reward)(reward.params, images, Context(tokens, source, target, editing))   # (b,) float32

Parameters are an argument, not part of the closure: billions of them must not become constants of a compiled step. To
bring your own reward write a class with these three members; nothing is registered or inherited.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax.numpy as jnp
import numpy as np

from dreamlite_jax.errors import UserError
from dreamlite_jax.rewards.config import Task
from dreamlite_jax.types import Array, Image, PerSample


@flax.struct.dataclass
class Context:
    """What a reward may look at beside the picture that it judges; a pytree of arrays, all with leading axis b.

    Attributes:
      tokens: of `Reward.prepare`.
      source: (b, H, W, 3) in [-1, 1], the picture that was edited; anything where editing is 0.
      target: (b, H, W, 3) in [-1, 1], the true picture of the training record, for rewards that compare with it. Only
        rewards that ask for it look at it, so where there is none (prompts alone) zeros do.
      editing: (b,) 1 for an edit, 0 for generation.
    """

    tokens: Mapping[str, Any]
    source: Image
    target: Image
    editing: PerSample


class Reward(Protocol):
    """A judge of pictures; higher is better. Its parameters are frozen."""

    params: Any  # a pytree of arrays, on the devices where they belong; {} if there are none

    def prepare(self, prompts: Sequence[str]) -> Mapping[str, Any]:
        """Host arrays for the prompts: shapes do not depend on them but for the leading axis, len(prompts), 0 too.

        Raises:
          UserError: a prompt is too long.
        """
        ...

    def __call__(self, params: Any, images: Image, context: Context) -> PerSample:
        """(b,) float32 scores of pictures (b, H, W, 3) in [-1, 1], differentiable in them.

        Decoders overshoot: values outside [-1, 1] come in. A judge of shown pictures clips them, as showing does.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Term:
    """One reward of a sum. Samples of other tasks than `tasks` get nothing from it."""

    name: str
    reward: Reward
    weight: float = 1.0
    tasks: tuple[Task, ...] = ("generate", "edit")


class Part(NamedTuple):
    """What one term says of a batch: unweighted scores (b,), 0 where it does not apply, and whether it does (b,)."""

    score: Array
    applies: Array


class RewardSum:
    """Several rewards weighted; itself a `Reward`.

    Every term runs on the whole batch, also on samples that it does not apply to: their shapes are part of the compiled
    step. Score one task a batch where that costs too much.
    """

    def __init__(self, terms: Sequence[Term]):
        self.terms = tuple(terms)
        names = [term.name for term in self.terms]
        if not names:
            raise UserError("rewards is empty; it needs at least one reward")
        if len(set(names)) < len(names):
            raise UserError(f"rewards have the names {', '.join(names)}; each needs its own")
        for term in self.terms:
            if not term.tasks:
                raise UserError(f"reward {term.name}: tasks is empty; it must have 'generate', 'edit' or both")
            if not np.isfinite(term.weight):
                raise UserError(f"reward {term.name}: weight is {term.weight}; it must be a finite number")

    @property
    def params(self) -> dict[str, Any]:
        return {term.name: term.reward.params for term in self.terms}

    def prepare(self, prompts: Sequence[str]) -> dict[str, Mapping[str, Any]]:
        return {term.name: term.reward.prepare(prompts) for term in self.terms}

    def parts(self, params: Any, images: Image, context: Context) -> dict[str, Part]:
        """Each term's scores by name: what a threshold per reward, and the log, are made of."""
        found = {}
        for term in self.terms:
            inner = context.replace(tokens=context.tokens[term.name])
            applies = jnp.zeros_like(context.editing)
            if "edit" in term.tasks:
                applies += context.editing
            if "generate" in term.tasks:
                applies += 1.0 - context.editing
            score = term.reward(params[term.name], images, inner)
            found[term.name] = Part(jnp.where(applies > 0, score, 0.0), applies)
        return found

    def __call__(self, params: Any, images: Image, context: Context) -> PerSample:
        parts = self.parts(params, images, context)
        return sum(term.weight * parts[term.name].score for term in self.terms)
