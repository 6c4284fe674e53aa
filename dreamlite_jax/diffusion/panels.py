"""In-context conditioning (paper section 3.2): the only file that knows left from right.

"width" is the model's layout, [noisy target | condition] side by side; "channel" is the rejected alternative of the
paper's ablation, the condition stacked behind the target's channels as in InstructPix2Pix.
"""

from typing import Literal

import jax.numpy as jnp

from dreamlite_jax.types import Array, Float, Latent

Layout = Literal["width", "channel"]
_AXIS = {"width": 2, "channel": 3}


def blank_like(target: Latent) -> Latent:
    """The condition of generation: zero latents (the released code's choice; not the VAE's latent of black)."""
    return jnp.zeros_like(target)


def compose(target: Latent, condition: Latent, layout: Layout = "width") -> Float[Array, "b h w2 c2"]:
    """Canvas of the noisy target and its clean condition, both (b, h, w, c): (b, h, 2w, c), or (b, h, w, 2c)."""
    return jnp.concatenate([target, condition], axis=_AXIS[layout])


def target_half(prediction: Float[Array, "b h w2 c"], layout: Layout = "width") -> Latent:
    """The target's part of a prediction on the canvas; the rest is never used, in loss or in sampling."""
    return prediction[:, :, : prediction.shape[2] // 2] if layout == "width" else prediction
