"""Small random models for the tests of conversion."""

import numpy as np

from dreamlite_jax import model_folder
from dreamlite_jax.config import ModelConfig, TextConfig, UNetConfig, VAEConfig


def small_config(**unet) -> ModelConfig:
    """Two levels; every kind of layer that the released network has."""
    fields = dict(
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_blocks=("cross", "self_cross"),
        up_blocks=("self_cross", "plain"),
        transformer_layers=(1, 1),
        num_heads=(2, 4),
        cross_attention_dim=48,
        text_dim=384,
        size_embed_dim=16,
        norm_groups=8,
    )
    vae = VAEConfig(width=16, encoder_blocks=(1, 1, 1, 1), decoder_blocks=(1, 1, 1, 1))
    text = TextConfig(max_length=48)
    return ModelConfig(unet=UNetConfig(**(fields | unet)), vae=vae, text=text, native_size=32, steps=4)


def random_params(config: ModelConfig, component: str, seed: int = 0) -> dict:
    """Parameters of the U-Net or the VAE: kernels that keep the variance, no scale 1 and no bias 0."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in model_folder.expected_shapes(component, getattr(config, component)).items():
        value = rng.standard_normal(shape).astype(np.float32)
        if name.endswith("kernel"):
            value *= np.prod(shape[:-1]) ** -0.5
        else:
            value = 0.1 * value + np.float32(name.endswith("scale"))
        tensors[name] = value.astype(np.float32)
    return model_folder.unflatten(tensors)
