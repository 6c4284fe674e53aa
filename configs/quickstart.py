"""The laptop run: a small DreamLite on sprites at 64 px, stage by stage. `launch/quickstart.sh` calls all three.

    python -m dreamlite_jax.train --config configs/quickstart.py:t2i   --workdir runs/quickstart/t2i
    python -m dreamlite_jax.train --config configs/quickstart.py:edit  --workdir runs/quickstart/edit
    python -m dreamlite_jax.train --config configs/quickstart.py:joint --workdir runs/quickstart/joint

Every field here is our choice: nothing of this size is published. The paper's are the stages and their order, panels
side by side, logit-normal sigmas with the resolution's shift, region-weighted edits, 1:1 joint mixing.
"""

from ml_collections import ConfigDict

from dreamlite_jax.recipes import stage_and_root

# The learning rate falls from its peak to `final_fraction` of it. Each stage starts about where the one before ends:
# with a full peak, the joint stage spent half of its steps on relearning.
STAGES = {
    "t2i": {"steps": 450, "before": "", "learning_rate": 1.5e-3, "final_fraction": 0.6},
    "edit": {"steps": 850, "before": "t2i", "learning_rate": 1.2e-3, "final_fraction": 0.7},
    "joint": {"steps": 1450, "before": "edit", "learning_rate": 1.1e-3, "final_fraction": 0.02},
}


def get_config(argument: str = "t2i") -> ConfigDict:
    """`argument` is STAGE or STAGE,ROOT: t2i, edit or joint, and the folder of the whole run (runs/quickstart)."""
    stage, root = stage_and_root(argument, STAGES, "runs/quickstart")
    recipe = STAGES[stage]
    c = ConfigDict()
    c.stage = "flow_matching"
    c.model = model()
    tasks = {"t2i": ["t2i"], "edit": ["edit"], "joint": ["t2i", "edit"]}[stage]
    c.data = ConfigDict(
        {
            "sources": tuple({"path": f"{root}/latents/{task}", "weight": 1.0} for task in tasks),
            "validation": tuple({"path": f"{root}/latents/{task}_validation"} for task in tasks),
            "batch_size": 32,
            "text_length": 48,
        }
    )
    c.optim = ConfigDict(
        {
            "learning_rate": recipe["learning_rate"],
            "warmup_steps": 100,
            "decay": "cosine",
            "final_fraction": recipe["final_fraction"],
            "weight_decay": 0.01,
            "ema_decay": 0.997,
        }
    )
    c.init_from = f"{root}/{recipe['before']}" if recipe["before"] else ""
    c.steps = recipe["steps"]
    c.checkpoint_every = 200
    c.grid_every = 500
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
            "guidance_scale": 2.5,
            "image_guidance_scale": 3.0,
        }
    )
