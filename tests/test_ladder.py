"""The compression ladder: each rung is a config, and the last one is the released network."""

import itertools
import math
from pathlib import Path

import jax
import pytest

from dreamlite_jax.config import UNetConfig
from dreamlite_jax.models.unet import UNet, dummy_inputs
from dreamlite_jax.training.config import load_config

LADDER = Path(__file__).parents[1] / "configs" / "ladder.py"
RUNGS = ("sdxl", "blocks", "channels", "no_self_attention", "separable", "ff3", "mqa")


def count(config: UNetConfig) -> int:
    shapes = jax.eval_shape(UNet(config).init, jax.random.key(0), *dummy_inputs(config))
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))


@pytest.fixture(scope="module")
def counts() -> dict[str, int]:
    return {rung: count(load_config(f"{LADDER}:{rung}").model.unet) for rung in RUNGS}


def test_every_rung_is_smaller_than_the_one_before(counts):
    assert all(counts[a] > counts[b] for a, b in itertools.pairwise(RUNGS)), counts


def test_ends_of_the_ladder(counts):
    assert counts["mqa"] == 389_968_388
    assert load_config(f"{LADDER}:mqa").model.unet == UNetConfig()
    assert 2.4e9 < counts["sdxl"] < 2.7e9  # the paper says 2.5 B


def test_channel_concat_only_widens_the_first_convolution(counts):
    config = load_config(f"{LADDER}:channel_concat").model.unet
    assert config.condition_layout == "channel"
    assert count(config) - counts["mqa"] == 3 * 3 * 4 * config.block_out_channels[0]
