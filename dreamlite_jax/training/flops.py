"""Floating-point operations of the U-Net from its config and shapes, and what chips can do at most.

One multiply-add is two operations. Matrix products and convolutions count; normalisations, activations and the softmax
do not. That is the convention of model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B): recomputation counts
neither, so that a run with `remat` shows what it costs.
"""

from dreamlite_jax.config import UNetConfig

BACKWARD = 2.0  # each product of the forward pass has two of its size in the backward pass

# Dense bfloat16 FLOP/s of one device, by JAX's `device_kind` (cloud.google.com/tpu/docs/system-architecture-tpu-vm).
PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


def peak(device_kind: str) -> float | None:
    """Most that one device can do, in FLOP/s; None for a kind that is not in the table."""
    return PEAK.get(device_kind)


def training_flops(config: UNetConfig, items: int, height: int, columns: int, text_length: int) -> float:
    """Forward and backward pass of a batch of so many canvases."""
    return (1.0 + BACKWARD) * items * unet_flops(config, height, columns, text_length)


def unet_flops(config: UNetConfig, height: int, columns: int, text_length: int) -> float:
    """One forward pass of one canvas of height x columns latent pixels, its condition panel included."""
    widths, last = config.block_out_channels, config.levels - 1
    time = 4 * widths[0]
    pixels = [height * columns // 4**level for level in range(config.levels)]
    total = 9 * config.in_channels * widths[0] * pixels[0] + 9 * widths[0] * config.out_channels * pixels[0]
    total += (widths[0] + time) * time + (2 * config.size_embed_dim + time) * time  # the two embedding MLPs
    total += text_length * config.text_dim * config.cross_attention_dim

    channels, skips = widths[0], [widths[0]]
    for level, kind in enumerate(config.down_blocks):
        for _ in range(config.layers_per_block):
            total += _res_block(config, channels, widths[level], time, pixels[level])
            channels = widths[level]
            total += _transformer(config, level, kind, pixels[level], text_length)
            skips.append(channels)
        if level != last:
            total += 9 * channels**2 * pixels[level + 1]
            skips.append(channels)
    total += _res_block(config, channels, channels, time, pixels[last])
    for _ in range(config.mid_layers):
        total += _transformer(config, last, "self_cross", pixels[last], text_length)
        total += _res_block(config, channels, channels, time, pixels[last])
    for level, kind in zip(reversed(range(config.levels)), config.up_blocks, strict=True):
        for _ in range(config.layers_per_block + 1):
            total += _res_block(config, channels + skips.pop(), widths[level], time, pixels[level])
            channels = widths[level]
            total += _transformer(config, level, kind, pixels[level], text_length)
        if level:
            total += 9 * channels**2 * pixels[level - 1]
    return 2.0 * total


def _res_block(config: UNetConfig, given: int, width: int, time: int, pixels: int) -> int:
    """Multiply-adds of a res block from `given` channels to `width`."""
    shortcut = given * width * pixels if given != width else 0
    if config.separable_convs:
        inner = 2 * width
        return shortcut + time * inner + pixels * (9 * given + given * inner + 9 * inner + inner * width)
    return shortcut + time * width + pixels * (9 * given * width + 9 * width * width)


def _transformer(config: UNetConfig, level: int, kind: str, pixels: int, text_length: int) -> int:
    """Multiply-adds of a spatial transformer of this kind."""
    if kind == "plain":
        return 0
    width, heads = config.block_out_channels[level], config.num_heads[level]
    keys = 2 * (config.num_kv_heads or heads) * (width // heads)  # keys and values
    block = 2 * pixels * width**2 + text_length * config.cross_attention_dim * keys + 2 * pixels * text_length * width
    block += 3 * config.ff_mult * pixels * width**2
    if kind == "self_cross":
        block += 2 * pixels * width**2 + pixels * width * keys + 2 * pixels**2 * width
    return 2 * pixels * width**2 + config.transformer_layers[level] * block
