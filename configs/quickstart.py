"""The laptop run: a small DreamLite on sprites at 64 px, stage by stage. `launch/quickstart.sh` calls all three.

    python -m dreamlite_jax.train --config configs/quickstart.py:t2i   --workdir runs/quickstart/t2i
    python -m dreamlite_jax.train --config configs/quickstart.py:edit  --workdir runs/quickstart/edit
    python -m dreamlite_jax.train --config configs/quickstart.py:joint --workdir runs/quickstart/joint

Every field here is our choice: nothing of this size is published. The paper's are the stages and their order, panels
side by side, logit-normal sigmas with the resolution's shift, region-weighted edits, 1:1 joint mixing.
"""

from ml_collections import ConfigDict

STAGES = {  # steps, and the stage to start from
    "t2i": (450, ""),
    "edit": (700, "t2i"),
    "joint": (700, "edit"),
}


def get_config(argument: str = "t2i") -> ConfigDict:
    """`argument` is STAGE or STAGE,ROOT: t2i, edit or joint, and the folder of the whole run (runs/quickstart)."""
    stage, _, root = argument.partition(",")
    root = root or "runs/quickstart"
    if stage not in STAGES:
        raise KeyError(f"stage {stage!r} is not one of {', '.join(STAGES)}")
    steps, before = STAGES[stage]
    c = ConfigDict()
    c.stage = "flow_matching"
    c.model = model()
    tasks = {"t2i": ["t2i"], "edit": ["edit"], "joint": ["t2i", "edit"]}[stage]
    c.data = ConfigDict(
        {
            "sources": tuple({"path": f"{root}/latents/{task}", "weight": 1.0} for task in tasks),
            "validation": tuple({"path": f"{root}/latents/{task}_validation"} for task in tasks),
            "batch_size": 64,
            "text_length": 48,
        }
    )
    c.optim = ConfigDict(
        {
            "learning_rate": 1.5e-3,
            "warmup_steps": 100,
            "decay": "cosine",
            "final_fraction": 0.1,
            "weight_decay": 0.01,
            "ema_decay": 0.995,
        }
    )
    c.init_from = f"{root}/{before}" if before else ""
    c.steps = steps
    c.checkpoint_every = 100
    c.grid_every = 350
    return c


def model() -> ConfigDict:
    """The full model's levels and block kinds, narrow; self-attention one level higher, cheap on an 8x16 canvas."""
    return ConfigDict(
        {
            "unet": {
                "in_channels": 16,
                "out_channels": 16,
                "block_out_channels": (96, 160, 256),
                "layers_per_block": 1,
                "down_blocks": ("cross", "self_cross", "self_cross"),
                "up_blocks": ("self_cross", "self_cross", "plain"),
                "transformer_layers": (1, 1, 1),
                "num_heads": (3, 5, 8),
                "cross_attention_dim": 256,
                "text_dim": 384,
                "size_embed_dim": 32,
                "norm_groups": 16,
            },
            "vae": {
                "latent_channels": 16,
                "width": 32,
                "encoder_blocks": (0, 1, 2, 2),
                "decoder_blocks": (2, 2, 1, 0),
            },
            "text": {"max_length": 64},
            "native_size": 64,
            "steps": 20,
            "guidance_scale": 3.0,
            "image_guidance_scale": 1.5,
        }
    )
