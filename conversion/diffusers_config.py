"""Architecture configs against the config.json files of diffusers (0.42.1), both ways and strictly.

Every key that changes the computation is either expressed by a field of ours or must have the one value we compute;
anything else is an error that names the key. A key that a file lacks has the default of diffusers.
"""

import math
from collections.abc import Mapping
from typing import Any

from dreamlite_jax.config import BlockKind, SchedulerConfig, UNetConfig, VAEConfig, suggestion
from dreamlite_jax.errors import UserError

DIFFUSERS_VERSION = "0.42.1"

# Both generations of names; the first of a kind is the one we write.
DOWN_BLOCKS: dict[str, BlockKind] = {
    "DreamLiteDownBlock2D": "plain",
    "DreamLiteCrossAttnNoSelfAttnDownBlock2D": "cross",
    "DreamLiteCrossAttnDownBlock2D": "self_cross",
    "DownBlock2D": "plain",
    "CrossAttnDownRemoveSelfAttnBlock2D": "cross",
    "CrossAttnDownBlock2D": "self_cross",
}
UP_BLOCKS: dict[str, BlockKind] = {
    "DreamLiteUpBlock2D": "plain",
    "DreamLiteCrossAttnNoSelfAttnUpBlock2D": "cross",
    "DreamLiteCrossAttnUpBlock2D": "self_cross",
    "UpBlock2D": "plain",
    "CrossAttnUpRemoveSelfAttnBlock2D": "cross",
    "CrossAttnUpRemoveSelfAttnBlock2DV1": "cross",
    "CrossAttnUpBlock2D": "self_cross",
}
MID_BLOCKS = ("DreamLiteUNetMidBlock2DCrossAttn", "UNetMidBlock2DCrossAttn")

# What a file must say (or leave out) because there is no other computation here.
UNET_FIXED = {
    "center_input_sample": False, "flip_sin_to_cos": True, "freq_shift": 0, "only_cross_attention": False,
    "downsample_padding": 1, "mid_block_scale_factor": 1, "dropout": 0.0, "act_fn": "silu",
    "reverse_transformer_layers_per_block": None, "dual_cross_attention": False, "class_embed_type": None,
    "num_class_embeds": None, "upcast_attention": False, "resnet_time_scale_shift": "default",
    "resnet_skip_time_act": False, "resnet_out_scale_factor": 1.0, "time_embedding_type": "positional",
    "time_embedding_dim": None, "time_embedding_act_fn": None, "timestep_post_act": None, "time_cond_proj_dim": None,
    "conv_in_kernel": 3, "conv_out_kernel": 3, "attention_type": "default", "class_embeddings_concat": False,
    "mid_block_only_cross_attention": None, "cross_attention_norm": None,
}  # fmt: skip
# The same, but diffusers' default is another value, so that a file must have the key.
UNET_REQUIRED = {
    "use_linear_projection": True,
    "addition_embed_type": "time",
    "encoder_hid_dim_type": "text_proj_rms",
}
UNET_DEFAULTS = {
    "in_channels": 4, "out_channels": 4, "block_out_channels": (320, 640, 1280), "layers_per_block": 2,
    "down_block_types": tuple(DOWN_BLOCKS)[1:2] * 2 + tuple(DOWN_BLOCKS)[2:3],
    "up_block_types": tuple(UP_BLOCKS)[2::-1],
    "mid_block_type": MID_BLOCKS[0], "num_mid_layers": 1, "transformer_layers_per_block": 1, "attention_head_dim": 64,
    "num_attention_heads": None, "num_kv_heads": 1, "qk_norm": "rms_norm", "ff_mult": 6, "use_sep_conv": True,
    "cross_attention_dim": 2048, "encoder_hid_dim": None, "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None, "norm_num_groups": 32, "norm_eps": 1e-5, "sample_size": None,
}  # fmt: skip
UNET_IGNORED = ("addition_embed_type_num_heads",)  # of another kind of added embedding

VAE_FIXED = {
    "in_channels": 3, "out_channels": 3, "act_fn": "relu", "upsample_fn": "nearest", "upsampling_scaling_factor": 2,
}  # fmt: skip
VAE_DEFAULTS = {
    "encoder_block_out_channels": (64, 64, 64, 64), "decoder_block_out_channels": (64, 64, 64, 64),
    "latent_channels": 4, "num_encoder_blocks": (1, 3, 3, 3), "num_decoder_blocks": (3, 3, 3, 1),
    "scaling_factor": 1.0, "shift_factor": 0.0,
}  # fmt: skip
# Of the 8-bit storage of latents, which we have not, and a copy of decoder_block_out_channels.
VAE_IGNORED = ("latent_magnitude", "latent_shift", "force_upcast", "block_out_channels")

SCHEDULER_FIXED = {
    "num_train_timesteps": 1000, "invert_sigmas": False, "shift_terminal": None, "use_karras_sigmas": False,
    "use_exponential_sigmas": False, "use_beta_sigmas": False, "time_shift_type": "exponential",
    "stochastic_sampling": False,
}  # fmt: skip
SCHEDULER_DEFAULTS = {
    "shift": 1.0, "use_dynamic_shifting": False, "base_shift": 0.5, "max_shift": 1.15, "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
}  # fmt: skip


def unet_from_diffusers(config: Mapping[str, Any], where: str) -> UNetConfig:
    """The architecture of a U-Net's config.json. Raises `UserError` for what is not a DreamLite U-Net."""
    _check_class(config, "DreamLiteUNetModel", where)
    required = {**UNET_FIXED, **UNET_REQUIRED}
    values = _read(config, required, UNET_DEFAULTS, UNET_IGNORED, where, needed=tuple(UNET_REQUIRED))
    channels = tuple(values["block_out_channels"])
    levels = len(channels)
    layers = set(_per_level(values["layers_per_block"], levels, f"{where}: layers_per_block"))
    _expect(len(layers) == 1, where, "layers_per_block", values["layers_per_block"], "the same number at every level")
    _expect(
        values["mid_block_type"] in MID_BLOCKS,
        where,
        "mid_block_type",
        values["mid_block_type"],
        " or ".join(MID_BLOCKS),
    )
    size_dim = values["addition_time_embed_dim"]
    size_input = values["projection_class_embeddings_input_dim"]
    _expect(isinstance(size_dim, int), where, "addition_time_embed_dim", size_dim, "a number such as 256")
    _expect(
        size_input == 2 * size_dim, where, "projection_class_embeddings_input_dim", size_input,
        f"twice addition_time_embed_dim, {2 * size_dim}: (width, height)",
    )  # fmt: skip
    _expect(values["qk_norm"] in ("rms_norm", None), where, "qk_norm", values["qk_norm"], "'rms_norm' or null")
    text_dim = values["encoder_hid_dim"]
    _expect(isinstance(text_dim, int), where, "encoder_hid_dim", text_dim, "the width of the text states, such as 2048")
    cross_dims = set(_per_level(values["cross_attention_dim"], levels, f"{where}: cross_attention_dim"))
    _expect(len(cross_dims) == 1, where, "cross_attention_dim", values["cross_attention_dim"], "one number")
    heads = values["num_attention_heads"] or values["attention_head_dim"]  # as diffusers, which misnames the latter
    inputs, outputs = values["in_channels"], values["out_channels"]
    return UNetConfig(
        in_channels=inputs,
        out_channels=outputs,
        block_out_channels=channels,
        layers_per_block=layers.pop(),
        down_blocks=_kinds(values["down_block_types"], DOWN_BLOCKS, f"{where}: down_block_types"),
        up_blocks=_kinds(values["up_block_types"], UP_BLOCKS, f"{where}: up_block_types"),
        mid_layers=values["num_mid_layers"],
        transformer_layers=_per_level(values["transformer_layers_per_block"], levels, f"{where}: transformer_layers_…"),
        num_heads=_per_level(heads, levels, f"{where}: attention_head_dim"),
        num_kv_heads=values["num_kv_heads"],
        qk_norm=values["qk_norm"] is not None,
        ff_mult=values["ff_mult"],
        separable_convs=values["use_sep_conv"],
        cross_attention_dim=cross_dims.pop(),
        text_dim=text_dim,
        size_embed_dim=size_dim,
        norm_groups=values["norm_num_groups"],
        norm_eps=values["norm_eps"],
        condition_layout="channel" if inputs == 2 * outputs else "width",
    )


def unet_to_diffusers(config: UNetConfig, sample_size: int = 128) -> dict[str, Any]:
    """The config.json of `DreamLiteUNetModel`; `sample_size` is the native latent size."""
    down = {kind: name for name, kind in reversed(DOWN_BLOCKS.items())}
    up = {kind: name for name, kind in reversed(UP_BLOCKS.items())}
    return {
        "_class_name": "DreamLiteUNetModel",
        "_diffusers_version": DIFFUSERS_VERSION,
        **UNET_FIXED,
        **UNET_REQUIRED,
        "sample_size": sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": list(config.block_out_channels),
        "layers_per_block": config.layers_per_block,
        "down_block_types": [down[kind] for kind in config.down_blocks],
        "mid_block_type": MID_BLOCKS[0],
        "up_block_types": [up[kind] for kind in config.up_blocks],
        "num_mid_layers": config.mid_layers,
        "transformer_layers_per_block": list(config.transformer_layers),
        "attention_head_dim": list(config.num_heads),
        "num_attention_heads": None,
        "num_kv_heads": config.num_kv_heads,
        "qk_norm": "rms_norm" if config.qk_norm else None,
        "ff_mult": config.ff_mult,
        "use_sep_conv": config.separable_convs,
        "cross_attention_dim": config.cross_attention_dim,
        "encoder_hid_dim": config.text_dim,
        "addition_time_embed_dim": config.size_embed_dim,
        "projection_class_embeddings_input_dim": 2 * config.size_embed_dim,
        "norm_num_groups": config.norm_groups,
        "norm_eps": config.norm_eps,
    }


def vae_from_diffusers(config: Mapping[str, Any], where: str) -> VAEConfig:
    """The architecture of a tiny autoencoder's config.json. Raises `UserError` for another kind."""
    _check_class(config, "AutoencoderTiny", where)
    values = _read(config, VAE_FIXED, VAE_DEFAULTS, VAE_IGNORED, where)
    widths = {*values["encoder_block_out_channels"], *values["decoder_block_out_channels"]}
    _expect(len(widths) == 1, where, "encoder/decoder_block_out_channels", sorted(widths), "one width at every level")
    return VAEConfig(
        latent_channels=values["latent_channels"],
        width=widths.pop(),
        encoder_blocks=tuple(values["num_encoder_blocks"]),
        decoder_blocks=tuple(values["num_decoder_blocks"]),
        scaling_factor=float(values["scaling_factor"]),
        shift_factor=float(values["shift_factor"] or 0.0),
    )


def vae_to_diffusers(config: VAEConfig) -> dict[str, Any]:
    """The config.json of `AutoencoderTiny`."""
    return {
        "_class_name": "AutoencoderTiny",
        "_diffusers_version": DIFFUSERS_VERSION,
        **VAE_FIXED,
        "encoder_block_out_channels": [config.width] * len(config.encoder_blocks),
        "decoder_block_out_channels": [config.width] * len(config.decoder_blocks),
        "latent_channels": config.latent_channels,
        "num_encoder_blocks": list(config.encoder_blocks),
        "num_decoder_blocks": list(config.decoder_blocks),
        "scaling_factor": config.scaling_factor,
        "shift_factor": config.shift_factor,
    }


def scheduler_from_diffusers(config: Mapping[str, Any], where: str) -> SchedulerConfig:
    """The time shift of a scheduler_config.json; a constant shift is a line without slope."""
    _check_class(config, "FlowMatchEulerDiscreteScheduler", where)
    values = _read(config, SCHEDULER_FIXED, SCHEDULER_DEFAULTS, (), where)
    low, high = values["base_shift"], values["max_shift"]
    if not values["use_dynamic_shifting"]:
        low = high = math.log(values["shift"])
    return SchedulerConfig(values["base_image_seq_len"], values["max_image_seq_len"], float(low), float(high))


def scheduler_to_diffusers(config: SchedulerConfig) -> dict[str, Any]:
    """The scheduler_config.json of `FlowMatchEulerDiscreteScheduler`."""
    return {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "_diffusers_version": DIFFUSERS_VERSION,
        **SCHEDULER_FIXED,
        "shift": 1.0,
        "use_dynamic_shifting": True,
        "base_shift": config.base_shift,
        "max_shift": config.max_shift,
        "base_image_seq_len": config.base_seq_len,
        "max_image_seq_len": config.max_seq_len,
    }


def _check_class(config: Mapping[str, Any], expected: str, where: str) -> None:
    found = config.get("_class_name", expected)
    if found == expected:
        return
    if found == "UNet2DConditionModel":
        kind = "an SDXL U-Net" if config.get("addition_embed_type") == "text_time" else "a Stable Diffusion U-Net"
        raise UserError(f"{where} is of {kind} ({found}), not of DreamLite; give a DreamLite folder ({expected})")
    raise UserError(f"{where} is of a {found}; it must be of a {expected}")


def _read(
    config: Mapping[str, Any],
    fixed: Mapping[str, Any],
    defaults: Mapping[str, Any],
    ignored: tuple[str, ...],
    where: str,
    needed: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Values of the keys in `defaults`. Keys of `fixed` are checked, those of `needed` must be there."""
    for key, value in config.items():
        if key.startswith("_") or key in ignored or key in defaults:
            continue
        if key not in fixed:
            raise UserError(f"{where}: {key} is not a known key{suggestion(key, {*fixed, *defaults})}")
        _expect(value == fixed[key], where, key, value, repr(fixed[key]))
    for key in needed:
        _expect(key in config, where, key, None, repr(fixed[key]))
    return {key: config.get(key, default) for key, default in defaults.items()}


def _expect(condition: bool, where: str, key: str, value: Any, right: str) -> None:
    if not condition:
        raise UserError(f"{where}: {key} is {value!r}; it must be {right}")


def _per_level(value: Any, levels: int, where: str) -> tuple[int, ...]:
    """One value a level, from one for all or a list."""
    values = (value,) * levels if isinstance(value, int) else tuple(value)
    if len(values) != levels or not all(isinstance(item, int) for item in values):
        raise UserError(f"{where} is {value!r}; it must be a number or {levels} numbers, one a level")
    return values


def _kinds(names: Any, known: Mapping[str, BlockKind], where: str) -> tuple[BlockKind, ...]:
    for name in names:
        if name not in known:
            raise UserError(f"{where} has {name!r}{suggestion(name, known)}")
    return tuple(known[name] for name in names)
