"""The demo's autoencoder: TAESD family, f8, 16 latent channels, 32 wide, on sprites at 64 px.

    . launch/env.sh && python -m dreamlite_jax.data.sprites --data_dir runs/vae/data
    XLA_FLAGS=--xla_force_host_platform_device_count=2 \
      python -m dreamlite_jax.train --config configs/vae.py:runs/vae/data --workdir runs/vae/train

One JAX device a core: XLA computes the kernel gradients of large pictures on one thread, so half the batch takes half
the time.
Two CPU cores, about 14 minutes. Expect 27 to 33 dB on validation pictures. The file shipped as
`dreamlite_jax/assets/sprites_vae.safetensors` was made by this command.
"""

from ml_collections import ConfigDict


def get_config(data_dir: str = "runs/quickstart/data") -> ConfigDict:
    """`data_dir` holds the sprites data sets t2i_64 and edit_64."""
    c = ConfigDict()
    c.stage = "vae"
    c.model = ConfigDict(
        {
            "vae": {
                "latent_channels": 16,
                "width": 32,
                "encoder_blocks": (0, 1, 2, 2),
                "decoder_blocks": (2, 2, 1, 0),
            },
            "unet": {"in_channels": 16, "out_channels": 16},
            "native_size": 64,
        }
    )
    c.data = ConfigDict()
    c.data.sources = (
        {"path": data_dir, "name": "t2i_64", "weight": 1.0},
        {"path": data_dir, "name": "edit_64", "weight": 1.0},
    )
    c.data.validation = ({"path": data_dir, "name": "t2i_64", "split": "validation"},)
    c.data.batch_size = 32
    c.optim = ConfigDict(
        {
            "learning_rate": 2.5e-3,
            "warmup_steps": 100,
            "decay": "cosine",
            "final_fraction": 0.02,
            "b2": 0.99,
            "weight_decay": 0.0,
            "ema_decay": 0.995,
        }
    )
    c.autoencoder = ConfigDict({"latent_noise": 0.15, "squared_weight": 4.0, "latent_weight": 0.05})
    c.steps = 4500
    c.log_every = 50
    c.checkpoint_every = 900
    c.grid_every = 900
    return c
