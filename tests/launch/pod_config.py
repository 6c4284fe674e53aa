"""A config for launch tests: two levels, one transformer, its feed-forward large enough to be sharded over fsdp."""

from ml_collections import ConfigDict


def get_config(root: str = "nowhere") -> ConfigDict:
    """`root` holds the folder latents."""
    c = ConfigDict()
    c.stage = "flow_matching"
    c.model = ConfigDict(
        {
            "unet": {
                "in_channels": 16,
                "out_channels": 16,
                "block_out_channels": (64, 128),
                "layers_per_block": 1,
                "down_blocks": ("plain", "self_cross"),
                "up_blocks": ("self_cross", "plain"),
                "transformer_layers": (0, 1),
                "num_heads": (1, 2),
                "cross_attention_dim": 64,
                "text_dim": 24,
                "size_embed_dim": 16,
            },
            "vae": {
                "latent_channels": 16,
                "width": 32,
                "encoder_blocks": (0, 1, 2, 2),
                "decoder_blocks": (2, 2, 1, 0),
            },
            "native_size": 128,
        }
    )
    c.data = ConfigDict({"sources": ({"path": f"{root}/latents"},), "batch_size": 16, "text_length": 8})
    c.steps = 5
    return c
