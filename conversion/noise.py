"""The start noise of the JAX sampler, in numpy, so that a seed gives one image on every runtime.

`jax.random.normal(jax.random.key(seed), shape)` is: Threefry-2x32 of the counter (Salmon et al. 2011, "Parallel random
numbers: as easy as 1, 2, 3", 20 rounds), its words xored; the upper 23 bits as a uniform in (-1, 1); sqrt(2) erfinv.
"""

import numpy as np

from dreamlite_jax.errors import UserError

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)
# Giles, "Approximating the erfinv function" (2010), single precision; the order of evaluation is Horner's.
_CENTRE = (
    2.81022636e-08, 3.43273939e-07, -3.5233877e-06, -4.39150654e-06, 0.00021858087, -0.00125372503, -0.00417768164,
    0.246640727, 1.50140941,
)  # fmt: skip
_TAIL = (
    -0.000200214257, 0.000100950558, 0.00134934322, -0.00367342844, 0.00573950773, -0.0076224613, 0.00943887047,
    1.00167406, 2.83297682,
)  # fmt: skip


def start_noise(seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """`jax.random.normal(jax.random.key(seed), shape, float32)`, within 1e-6 and without JAX.

    Raises:
      UserError: a seed outside 0..2**32-1.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}; it must be from 0 to {2**32 - 1}")
    counter = np.arange(np.prod(shape), dtype=np.uint64)
    high, low = threefry2x32(
        (np.uint32(0), np.uint32(seed)), (counter >> np.uint64(32)).astype(np.uint32), counter.astype(np.uint32)
    )
    mantissa = ((high ^ low) >> np.uint32(9)) | np.uint32(0x3F800000)
    unit = mantissa.view(np.float32) - np.float32(1.0)
    lowest = np.nextafter(np.float32(-1.0), np.float32(0.0))
    uniform = np.maximum(lowest, unit * (np.float32(1.0) - lowest) + lowest)
    return (np.float32(np.sqrt(2)) * erfinv(uniform)).reshape(shape)


def threefry2x32(key: tuple[np.uint32, np.uint32], x0: np.ndarray, x1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Threefry-2x32 with 20 rounds of the counters (x0, x1), uint32."""
    schedule = (key[0], key[1], key[0] ^ key[1] ^ _PARITY)
    with np.errstate(over="ignore"):  # arithmetic is modulo 2**32
        x0, x1 = x0 + schedule[0], x1 + schedule[1]
        for group in range(5):
            for rotation in _ROTATIONS[group % 2]:
                x0 = x0 + x1
                x1 = (x1 << np.uint32(rotation)) | (x1 >> np.uint32(32 - rotation))
                x1 = x1 ^ x0
            x0 = x0 + schedule[(group + 1) % 3]
            x1 = x1 + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return x0, x1


def erfinv(x: np.ndarray) -> np.ndarray:
    """Inverse error function of float32 in (-1, 1), by the polynomials that XLA uses."""
    w = -np.log1p(-x * x)
    centre = w < np.float32(5.0)
    w = np.where(centre, w - np.float32(2.5), np.sqrt(np.maximum(w, np.float32(5.0))) - np.float32(3.0))
    result = np.where(centre, np.float32(_CENTRE[0]), np.float32(_TAIL[0]))
    for inner, outer in zip(_CENTRE[1:], _TAIL[1:], strict=True):
        result = np.where(centre, np.float32(inner), np.float32(outer)) + result * w
    return result * x
