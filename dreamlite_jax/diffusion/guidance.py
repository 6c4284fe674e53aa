"""Classifier-free guidance (spec section 5): which branches a sampler evaluates, and how their velocities combine.

A branch says whether it sees the prompt and the source image. All branches of a step run as one batch.
"""

import dataclasses

from dreamlite_jax.types import Array, Float, Latent, Scalar


@dataclasses.dataclass(frozen=True)
class Branch:
    text: bool
    image: bool


UNGUIDED = (Branch(text=True, image=True),)
SINGLE = (Branch(text=False, image=False), Branch(text=True, image=True))
DUAL = (Branch(text=False, image=False), Branch(text=False, image=True), Branch(text=True, image=True))


def branches(editing: bool, guided: bool) -> tuple[Branch, ...]:
    """The branches of a sampler: one without guidance, two to generate, three to edit."""
    if not guided:
        return UNGUIDED
    return DUAL if editing else SINGLE


def is_guided(editing: bool, guidance_scale: float, image_guidance_scale: float) -> bool:
    """Whether other branches than the prompt's matter: where all scales are 1 they cancel in `combine`."""
    return guidance_scale != 1.0 or (editing and image_guidance_scale != 1.0)


def combine(
    velocities: Float[Array, "g b h w c"], guidance_scale: Scalar | float, image_guidance_scale: Scalar | float
) -> Latent:
    """Guided velocity of the stacked branches, in the order of `branches`.

    One: v. Two: v0 + g (v1 - v0). Three: v0 + g (v_text - v_image) + g_image (v_image - v0), InstructPix2Pix eq. 3.
    """
    match velocities.shape[0]:
        case 1:
            return velocities[0]
        case 2:
            return velocities[0] + guidance_scale * (velocities[1] - velocities[0])
        case 3:
            null, image, text = velocities
            return null + guidance_scale * (text - image) + image_guidance_scale * (image - null)
    raise ValueError(f"{velocities.shape[0]} branches; 1, 2 or 3 are defined")
