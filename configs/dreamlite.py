"""The full-size recipe (the paper, arXiv 2603.28713, section 4), stage by stage, for TPU pods.

    python -m dreamlite_jax.train --config configs/dreamlite.py:t2i_256 --workdir /gcs/runs/t2i_256

Each stage starts from the one before it in the table; launch/README.md has the commands of a pod from nothing. Folder
ROOT (default /gcs: the bucket as launch/tpu_vm.sh mounts it) holds released/ (conversion.from_torch; the autoencoder is
taken from it), latents/ (configs/dreamlite_latents.py) and runs/; another: --config configs/dreamlite.py:t2i_256,ROOT.

| stage     | pixels | data                          | starts from | chips         | steps   | batch |
|-----------|--------|-------------------------------|-------------|---------------|---------|-------|
| t2i_256   | 256²   | text and picture, 20 M        | nothing     | v5e:4x4       | 300,000 | 2,048 |
| t2i_512   | 512²   | the same                      | t2i_256     | v5e:16x16     | 100,000 | 2,048 |
| t2i_1024  | 1024²  | the same                      | t2i_512     | v5e:16x16     |  50,000 | 1,024 |
| edit      | 1024²  | source, instruction, target, 1.74 M | t2i_1024 | v5e:16x16  |  30,000 | 1,024 |
| joint     | 1024²  | both, 1:1                     | edit        | v5e:16x16     |  50,000 | 1,024 |
| sft       | 1024²  | both, 0.5 M chosen by hand    | joint       | v5e:16x16     |   5,000 |   512 |

Hours: unmeasured. Metric to expect after joint and sft, before reinforcement learning: GenEval 0.71 and ImgEdit 3.88
(published; unmeasured here). Memory a chip and collectives of t2i_256 and joint stand in launch/README.md.

Published: the stages and their order, 256 → 512 → 1024 with aspect-ratio buckets, logit-normal sigmas with the
resolution's shift, target and condition side by side, and, from one reading of the paper, the weight log2(x) + 1 of a
changed region, the 1:1 mixture and the sizes of the data.
Our choice, since nothing of it is published: learning rates (1e-4 to 2e-4 with clipping at 1.0; 2.8e-4 without diverged
in a comparable run), AdamW (0.9, 0.95), EMA 0.9999, batches, steps, warmup, drops of 10 % (text and source
independently, as in InstructPix2Pix), the resolution of the edit stage, the steps of the buckets, the mesh.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from dreamlite_jax.recipes import stage_and_root


class Recipe(NamedTuple):
    """What differs from stage to stage; `before` is the stage to start from."""

    pixels: int
    tasks: tuple[str, ...]
    before: str
    steps: int
    batch_size: int
    accumulate: int
    learning_rate: float = 1e-4


STAGES = {
    "t2i_256": Recipe(256, ("t2i",), "", steps=300_000, batch_size=2048, accumulate=4, learning_rate=2e-4),
    "t2i_512": Recipe(512, ("t2i",), "t2i_256", steps=100_000, batch_size=2048, accumulate=1),
    "t2i_1024": Recipe(1024, ("t2i",), "t2i_512", steps=50_000, batch_size=1024, accumulate=4),
    "edit": Recipe(1024, ("edit",), "t2i_1024", steps=30_000, batch_size=1024, accumulate=4),
    "joint": Recipe(1024, ("t2i", "edit"), "edit", steps=50_000, batch_size=1024, accumulate=4),
    "sft": Recipe(1024, ("sft_t2i", "sft_edit"), "joint", 5_000, batch_size=512, accumulate=2, learning_rate=2e-5),
}
TEXT_LENGTH = {"t2i": 200, "edit": 384}  # of a prompt; of an instruction after its picture's 263 states


def get_config(argument: str = "t2i_256") -> ConfigDict:
    """`argument` is STAGE or STAGE,ROOT: one of the table, and the folder of all data and runs."""
    stage, root = stage_and_root(argument, STAGES, "/gcs")
    recipe = STAGES[stage]
    pixels = recipe.pixels
    c = ConfigDict()
    c.stage = "flow_matching"
    c.model = model(root)
    sources = [f"{root}/latents/{task}_{pixels}" for task in recipe.tasks]
    c.data = ConfigDict(
        {
            "sources": tuple({"path": path, "weight": 1.0} for path in sources),
            "validation": tuple({"path": f"{path}_validation"} for path in sources),
            "batch_size": recipe.batch_size,
            "text_length": max(TEXT_LENGTH[task.removeprefix("sft_")] for task in recipe.tasks),
            "threads": 16,
            # Latents have the size they were made with; this says it to what has no data to look at.
            "buckets": {"size": pixels, "multiple": pixels // 8, "max_ratio": 2.0},
        }
    )
    c.flow = ConfigDict({"text_drop": 0.1, "image_drop": 0.1, "region_weight": True})
    c.optim = ConfigDict(
        {
            "learning_rate": recipe.learning_rate,
            "warmup_steps": 2000 if recipe.before else 5000,
            "decay": "cosine" if stage == "sft" else "constant",
            "b1": 0.9,
            "b2": 0.95,
            "weight_decay": 0.01,
            "clip_norm": 1.0,
            "ema_decay": 0.9999,
        }
    )
    # Of a 4x4 slice not all 16: there the compiler sums gradients whole on every chip instead of scattering them.
    c.mesh = ConfigDict({"fsdp": 8 if stage == "t2i_256" else 16})
    c.dtype = "bfloat16"
    c.remat = True
    c.accumulate = recipe.accumulate
    c.init_from = f"{root}/runs/{recipe.before}" if recipe.before else ""
    c.vae = f"{root}/released/vae.safetensors"
    c.steps = recipe.steps
    c.log_every = 100
    c.checkpoint_every = 1000
    c.keep_checkpoints = 3
    c.grid_every = 5000
    return c


def model(root: str) -> ConfigDict:
    """The released network (all defaults), its autoencoder, and Qwen3-VL-2B of ROOT/released for the text."""
    return ConfigDict({"text": {"encoder": "qwen3_vl", "source": f"{root}/released", "max_length": 384}})
