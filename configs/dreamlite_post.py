"""The full-size recipe after SFT (configs/dreamlite.py): reinforcement by ReFL, and distillation to four steps by DMD2.

    python -m dreamlite_jax.train --config configs/dreamlite_post.py:refl --workdir /gcs/runs/refl
    python -m dreamlite_jax.train --config configs/dreamlite_post.py:dmd2 --workdir /gcs/runs/dmd2

ROOT is that of configs/dreamlite.py; ReFL also reads ROOT/rewards: hpsv3/ and editreward/ (the released checkpoints),
qwen2_vl_7b/ and qwen2_5_vl_7b/ (the folders of their base models). Its latents are squares alone (t2i_512_square and
edit_512_square of configs/dreamlite_latents.py): a judge is set up for pictures of one size.

| stage | pixels | starts from | steps  | batch |
|-------|--------|-------------|--------|-------|
| refl  | 512²   | sft         |  2,000 |   128 |
| dmd2  | 1024²  | refl        | 10,000 |   128 |

Chips and hours: unmeasured. Metrics to expect (published; unmeasured here): after ReFL GenEval 0.72 and ImgEdit 4.11,
from 0.71 and 3.88; after DMD2 GenEval 0.70 in four steps.

Published: HPSv3 for generation and EditReward for editing [paper], their thresholds 11 and 2.5 [one reading of it];
DMD2 from a teacher of 28 guided steps (3.5; image 1.5) to 4 without guidance [paper]; of DMD2 itself (arXiv
2405.14867): learning rate 5e-7 of both networks, 5 updates of the fake score a step, noise from 2 to 98 %, GAN weights
5e-3 and 1e-2, betas 0.9 and 0.999, clipping at 10.
Our choice: everything else of ReFL (learning rate, weight, schedule of 28 steps with the gradient in the last quarter,
512 px, batch, steps, bounds of collapse), and of DMD2 the steps, the batch and the EMA.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from dreamlite_jax.recipes import config_beside, stage_and_root


class Recipe(NamedTuple):
    """What differs from stage to stage.

    Attributes:
      latents: name of the folders of latents, after the task.
      max_ratio: width over height of the widest bucket.
      before: the stage to start from.
    """

    pixels: int
    latents: str
    max_ratio: float
    before: str
    steps: int
    learning_rate: float
    batch_size: int = 128


STAGES = {
    "refl": Recipe(512, "512_square", max_ratio=1.0, before="sft", steps=2_000, learning_rate=1e-5),
    "dmd2": Recipe(1024, "1024", max_ratio=2.0, before="refl", steps=10_000, learning_rate=5e-7),
}


def get_config(argument: str = "refl") -> ConfigDict:
    """`argument` is STAGE or STAGE,ROOT: refl or dmd2, and the folder of all data and runs."""
    stage, root = stage_and_root(argument, STAGES, "/gcs")
    recipe = STAGES[stage]
    pixels = recipe.pixels
    c = config_beside(__file__, f"dreamlite.py:joint,{root}")
    c.stage = stage
    c.init_from = f"{root}/runs/{recipe.before}"
    c.steps = recipe.steps
    c.accumulate = 1
    c.data.batch_size = recipe.batch_size
    sources = [f"{root}/latents/{task}_{recipe.latents}" for task in ("t2i", "edit")]
    c.data.sources = tuple({"path": path, "weight": 1.0} for path in sources)
    c.data.validation = tuple({"path": f"{path}_validation"} for path in sources)
    c.data.buckets = ConfigDict({"size": pixels, "multiple": pixels // 8, "max_ratio": recipe.max_ratio})
    c.optim.update(
        {"learning_rate": recipe.learning_rate, "warmup_steps": 100, "decay": "constant", "ema_decay": 0.999}
    )
    c.checkpoint_every = 250
    c.grid_every = 500
    if stage == "refl":
        c.refl = refl(f"{root}/rewards", pixels)
    else:
        c.optim.update({"b2": 0.999, "clip_norm": 10.0})
        c.dmd = dmd()
        c.model.update({"steps": 4, "guidance_scale": 1.0, "image_guidance_scale": 1.0})
    return c


def refl(rewards: str, pixels: int) -> ConfigDict:
    return ConfigDict(
        {
            "rewards": (
                {
                    "kind": "hpsv3",
                    "checkpoint": f"{rewards}/hpsv3",
                    "base": f"{rewards}/qwen2_vl_7b",
                    "backbone": "qwen2_vl_7b",
                    "size_px": (pixels, pixels),
                    "threshold": 11.0,
                    "tasks": ("generate",),
                },
                {
                    "kind": "editreward",
                    "checkpoint": f"{rewards}/editreward",
                    "base": f"{rewards}/qwen2_5_vl_7b",
                    "backbone": "qwen2_5_vl_7b",
                    "size_px": (pixels, pixels),
                    "threshold": 2.5,
                    "tasks": ("edit",),
                },
            ),
            "reward_weight": 1e-3,
            "flow_weight": 1.0,
            "steps": 28,
            "late_share": 0.25,
            "max_drift": 0.3,
            "min_diversity": 0.5,
        }
    )


def dmd() -> ConfigDict:
    return ConfigDict(
        {
            "guidance_scale": 3.5,
            "image_guidance_scale": 1.5,
            "noise_range": (0.02, 0.98),
            "fake_updates": 5,
            "fake": {"learning_rate": 5e-7, "warmup_steps": 0, "b2": 0.999, "clip_norm": 10.0},
            "gan_generator_weight": 5e-3,
            "gan_fake_weight": 1e-2,
        }
    )
