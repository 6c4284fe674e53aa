"""After the laptop run's joint stage: SFT, ReFL, and distillation to four steps without guidance.

    python -m dreamlite_jax.train --config configs/quickstart_post.py:sft  --workdir runs/quickstart/sft
    python -m dreamlite_jax.train --config configs/quickstart_post.py:refl --workdir runs/quickstart/refl
    python -m dreamlite_jax.train --config configs/quickstart_post.py:dmd2 --workdir runs/quickstart/dmd2

Two CPU cores that are slow: 4, 9 and 21 minutes with compilation. Metrics on held-out combinations: README.md.

Published are the stages and their order, ReFL with a threshold a reward, DMD2 to four steps. All numbers here are ours.
Nothing of the sprites is curated, so SFT is the joint stage's data at a low learning rate. The reward compares with the
picture that the words determine (`rewards.perceptual.TargetReward`).
"""

from ml_collections import ConfigDict

from dreamlite_jax.recipes import config_beside, stage_and_root

STAGES = {
    "sft": {"steps": 200, "before": "joint", "learning_rate": 3e-4, "ema_decay": 0.99},
    "refl": {"steps": 150, "before": "sft", "learning_rate": 2e-4, "ema_decay": 0.98},
    "dmd2": {"steps": 350, "before": "refl", "learning_rate": 1e-4, "ema_decay": 0.99},
}


def get_config(argument: str = "sft") -> ConfigDict:
    """`argument` is STAGE or STAGE,ROOT: sft, refl or dmd2, and the folder of the whole run (runs/quickstart)."""
    stage, root = stage_and_root(argument, STAGES, "runs/quickstart")
    recipe = STAGES[stage]
    c = config_beside(__file__, f"quickstart.py:joint,{root}")
    c.stage = "flow_matching" if stage == "sft" else stage
    c.init_from = f"{root}/{recipe['before']}"
    c.steps = recipe["steps"]
    c.data.batch_size = 32
    c.optim.update(
        {
            "learning_rate": recipe["learning_rate"],
            "warmup_steps": 20,
            **({"decay": "constant", "final_fraction": 0.0} if stage == "refl" else {"final_fraction": 0.1}),
            "ema_decay": recipe["ema_decay"],
        }
    )
    c.log_every = 10
    c.checkpoint_every = 50
    c.grid_every = c.steps
    if stage == "refl":
        c.refl = refl()
    if stage == "dmd2":
        c.dmd = dmd(c.model.guidance_scale)
        c.model.update({"steps": 4, "guidance_scale": 1.0, "image_guidance_scale": 1.0})
    return c


def refl() -> ConfigDict:
    """Eight unguided steps to a picture, the gradient in one of the last four."""
    return ConfigDict(
        {
            "rewards": ({"kind": "target"},),
            "reward_weight": 0.3,
            "flow_weight": 1.0,
            "steps": 8,
            "late_share": 0.5,
            "max_drift": 0.5,
            "min_diversity": 0.5,
        }
    )


def dmd(guidance_scale: float) -> ConfigDict:
    """The teacher as it is sampled, with less image guidance: with all of it the student edits too little (README)."""
    return ConfigDict(
        {
            "guidance_scale": guidance_scale,
            "image_guidance_scale": 2.5,
            "fake_updates": 2,
            "fake": {"learning_rate": 3e-4, "warmup_steps": 0, "weight_decay": 0.0},
        }
    )
