"""Array types in signatures, and the one glossary of dimension letters.

b  batch                      h, w  latent height and width of ONE panel      w2  latent width of the composed canvas
H, W  image height and width, pixels (8 h, 8 w)     c  latent or feature channels       n  tokens of a feature map, h·w
s  text tokens                d  width of a text state     e  width of a token           k  query heads
o  output channels or width, where they differ from the input's

Signatures are checked at run time in tests only (`tests/conftest.py` installs the checker).
"""

import jax
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray

Array = jax.Array | np.ndarray

Image = Float[Array, "b H W 3"]
Latent = Float[Array, "b h w c"]
FeatureMap = Float[Array, "b h w c"]
Tokens = Float[Array, "b n e"]
TextStates = Float[Array, "b s d"]
TextMask = Float[Array, "b s"]
TimeIds = Float[Array, "b 2"]
PerSample = Float[Array, "b"]
Scalar = Float[Array, ""]

__all__ = [
    "Array",
    "FeatureMap",
    "Float",
    "Image",
    "Int",
    "Latent",
    "PRNGKeyArray",
    "PerSample",
    "Scalar",
    "TextMask",
    "TextStates",
    "TimeIds",
    "Tokens",
]
