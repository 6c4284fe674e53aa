"""A vision-language backbone with the reward heads of HPSv3 and EditReward."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from dreamlite_jax.models.qwen_vl import rope
from dreamlite_jax.models.qwen_vl.load import LeafPath, torch_name
from dreamlite_jax.models.qwen_vl.model import QwenVL
from dreamlite_jax.types import Array, Float, Int

WIDTHS = {"layers_0": 1024, "layers_3": 16, "layers_5": 2}  # numbered as in the oracle's `nn.Sequential`


class RewardHead(nn.Module):
    """State of one token to the mean and the log deviation of its score; always float32."""

    @nn.compact
    def __call__(self, state: Float[Array, "*b d"]) -> Float[Array, "*b 2"]:
        x = state.astype(jnp.float32)
        for name, width in WIDTHS.items():
            x = nn.Dense(width, name=name)(x)
            x = x if name == "layers_5" else nn.relu(x)
        return x


class RewardNetwork(QwenVL):
    """Several texts about the same pictures, each judged at its last token by a head of its own.

    Oracles: `Qwen2VLRewardModelBT` of HPSv3 (one head), `Qwen2_5_VLRewardModelBT_MultiHead` and
    `Qwen3_VLRewardModelBT_MultiHead` of EditReward (two).

    Attributes beside those of `QwenVL`:
      heads: texts a sample.
    """

    heads: int = 1

    def setup(self):
        super().setup()
        self.rm_heads = [RewardHead() for _ in range(self.heads)]

    def __call__(
        self,
        ids: Int[Array, "b h s"],
        mask: Array,
        positions: Int[Array, "b h 3 s"],
        patches: Sequence[Float[Array, "b n p"]],
        grid: rope.Grid,
    ) -> Float[Array, "b h 2"]:
        """Mean and log deviation by each head.

        Args:
          ids: right-padded texts that end with the token that is judged; all show the same pictures.
          mask: (b, h, s), above 0 = keep.
          patches: of each picture of a sample, in the order of their image tokens, all of one `grid`. The last one is
            judged; nothing is differentiated with respect to the others, nor kept for it.
        """
        batch, heads = ids.shape[:2]
        seen = [self.see(picture[:, None], grid) for picture in patches]
        seen = [*jax.lax.stop_gradient(seen[:-1]), seen[-1]]
        tokens, taps = (jnp.concatenate(parts, -2) for parts in zip(*seen, strict=True))

        def by_text(x: Array) -> Array:  # (b, h, …) -> (b · h, …)
            return x.reshape(batch * heads, *x.shape[2:])

        flat_mask = by_text(mask)
        states = self.read(
            by_text(ids),
            flat_mask,
            jnp.moveaxis(by_text(positions), 1, 0),
            jnp.repeat(tokens, heads, 0),
            jnp.repeat(taps, heads, 1),
        )
        last = (flat_mask > 0).sum(-1) - 1
        judged = jnp.take_along_axis(states, last[:, None, None], 1).reshape(batch, heads, -1)
        return jnp.stack([head(judged[:, i]) for i, head in enumerate(self.rm_heads)], 1)

    def example(self) -> tuple[Any, ...]:
        ids, mask, _, patches = super().example()
        ids, mask = (np.repeat(x[:, None], self.heads, 1) for x in (ids, mask))
        return ids, mask, np.zeros((1, self.heads, 3, 1), np.int32), [patches[:, 0]]


def head_names(heads: int) -> Callable[[LeafPath, int | None], str]:
    """Names of leaves in a released checkpoint: rm_head.0.weight of one head, rm_heads.head_1.0.weight of several."""

    def name(path: LeafPath, layer: int | None) -> str:
        if not path[0].startswith("rm_heads_"):
            return torch_name(path, layer)
        head, dense = path[0].removeprefix("rm_heads_"), path[1].removeprefix("layers_")
        prefix = "rm_head" if heads == 1 else f"rm_heads.head_{head}"
        return f"{prefix}.{dense}.{'bias' if path[-1] == 'bias' else 'weight'}"

    return name
