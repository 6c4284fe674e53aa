"""Rewards from their configs."""

from collections.abc import Sequence

from dreamlite_jax.assets import vae_path
from dreamlite_jax.rewards.base import Reward, RewardSum, Term
from dreamlite_jax.rewards.config import RewardConfig
from dreamlite_jax.rewards.perceptual import TargetReward


def load_rewards(configs: Sequence[RewardConfig]) -> RewardSum:
    """All rewards of a stage, named by kind (and number, where one kind comes twice)."""
    terms, kinds = [], [config.kind for config in configs]
    for i, config in enumerate(configs):
        name = config.kind if kinds.count(config.kind) == 1 else f"{config.kind}_{i}"
        terms.append(Term(name, load_reward(config), config.weight, config.tasks))
    return RewardSum(terms)


def load_reward(config: RewardConfig) -> Reward:
    """One reward; raises `UserError` where a file is missing or does not belong to the model."""
    return TargetReward.from_vae(vae_path(config.checkpoint))
