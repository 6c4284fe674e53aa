"""Numpy noise against jax.random."""

import jax
import numpy as np
import pytest

from conversion.noise import erfinv, start_noise, threefry2x32
from dreamlite_jax.diffusion.sampler import noise_from_seeds
from dreamlite_jax.errors import UserError


@pytest.mark.parametrize("seed", [0, 1, 7, 2**31, 2**32 - 1])
def test_start_noise_is_the_samplers(seed):
    wanted = np.asarray(noise_from_seeds([seed], (16, 24, 4)))[0]
    found = start_noise(seed, (16, 24, 4))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-6)


def test_noise_of_another_seed_is_other_noise():
    assert np.abs(start_noise(1, (8, 8)) - start_noise(2, (8, 8))).max() > 1


def test_threefry_known_answers():
    # From the test vectors of the Random123 library (kat_vectors, threefry2x32 with 20 rounds).
    zero, ones = np.zeros(1, np.uint32), np.full(1, 0xFFFFFFFF, np.uint32)
    assert [int(x[0]) for x in threefry2x32((np.uint32(0), np.uint32(0)), zero, zero)] == [0x6B200159, 0x99BA4EFE]
    key = (np.uint32(0xFFFFFFFF), np.uint32(0xFFFFFFFF))
    assert [int(x[0]) for x in threefry2x32(key, ones, ones)] == [0x1CB996FC, 0xBB002BE7]


def test_erfinv_inverts_erf():
    x = np.linspace(-0.9999, 0.9999, 2001, dtype=np.float32)
    np.testing.assert_allclose(np.asarray(jax.lax.erf(erfinv(x))), x, atol=3e-7)


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(UserError, match="seed"):
        start_noise(seed, (2, 2))
