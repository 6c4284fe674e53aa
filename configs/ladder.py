"""The compression ladder of the paper (figure 3), from SDXL's U-Net to the released one, and channel concat.

    python -m dreamlite_jax.train --config configs/ladder.py:separable --workdir DIR --check

The order of the rungs and their values are the paper's; it prints no parameter counts per rung, so these are what the
configs count to. Where a rung leaves a choice open (when the first level gets its cross-attention), it is ours.
Reads ROOT/latents/t2i_1024 and ROOT/released, as configs/dreamlite.py; `--check` needs neither. Another ROOT than /gcs:
--config configs/ladder.py:separable,ROOT. Chips, hours, metric: unmeasured.

    sdxl               2,612 M   blocks [0, 2, 10], channels 320/640/1280, SDXL's blocks around DreamLite's embeddings
    blocks             1,337 M   [0, 2, 10] → [0, 2, 4]
    channels             722 M   → 256/512/896
    no_self_attention    716 M   self-attention on the lowest level alone; one cross-attention block on the first
    separable            606 M   depthwise and pointwise convolutions, expansion 2
    ff3                  540 M   feed-forward 4 → 3
    mqa                  390 M   one key/value head: the released network
    channel_concat       390 M   the ablation: condition behind the target's channels instead of beside it
"""

from ml_collections import ConfigDict

from dreamlite_jax.recipes import stage_and_root

RUNGS = ("sdxl", "blocks", "channels", "no_self_attention", "separable", "ff3", "mqa", "channel_concat")


def get_config(argument: str = "mqa") -> ConfigDict:
    """`argument` is RUNG or RUNG,ROOT. Each rung contains those before it; "mqa" is the released network."""
    rung, root = stage_and_root(argument, RUNGS, "/gcs")
    height = RUNGS.index(rung)
    unet = {
        "block_out_channels": (320, 640, 1280),
        "num_heads": (5, 10, 20),
        "transformer_layers": (0, 2, 10),
        "down_blocks": ("plain", "self_cross", "self_cross"),
        "up_blocks": ("self_cross", "self_cross", "plain"),
        "num_kv_heads": None,
        "qk_norm": False,
        "ff_mult": 4,
        "separable_convs": False,
    }
    steps = (
        {"transformer_layers": (0, 2, 4)},
        {"block_out_channels": (256, 512, 896), "num_heads": (4, 8, 14)},
        {
            "transformer_layers": (1, 2, 4),
            "down_blocks": ("cross", "cross", "self_cross"),
            "up_blocks": ("self_cross", "cross", "plain"),
        },
        {"separable_convs": True},
        {"ff_mult": 3},
        {"num_kv_heads": 1, "qk_norm": True},
        {"condition_layout": "channel", "in_channels": 8},
    )
    for step in steps[:height]:
        unet.update(step)
    c = ConfigDict()
    c.stage = "flow_matching"
    c.model = ConfigDict(
        {"unet": unet, "text": {"encoder": "qwen3_vl", "source": f"{root}/released", "max_length": 200}}
    )
    c.data = ConfigDict({"sources": ({"path": f"{root}/latents/t2i_1024"},), "batch_size": 1024, "text_length": 200})
    c.vae = f"{root}/released/vae.safetensors"
    c.steps = 100_000
    c.dtype = "bfloat16"
    c.remat = True
    return c
