"""How close a converted file is to the JAX model in float32: per component, and for a whole picture.

The reference is the flax module that trains and samples, not the export form, so that both steps are under test.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dreamlite_jax import pictures
from dreamlite_jax.config import ModelConfig
from dreamlite_jax.diffusion import flow, guidance, sampler
from dreamlite_jax.models import minilm
from dreamlite_jax.models.blocks import MASK_BIAS
from dreamlite_jax.models.qwen_vl import rope
from dreamlite_jax.models.qwen_vl.config import TextTowerConfig
from dreamlite_jax.models.qwen_vl.text import TextTower
from dreamlite_jax.models.unet import UNet
from dreamlite_jax.models.vae import VAE
from dreamlite_jax.text.templates import GENERATE_CHAT

from .graph import Component, Sizes
from .runtime import Runtime, sinusoid

CASES = 2  # random inputs a component is compared on
TextConfig = minilm.MiniLMConfig | TextTowerConfig


@dataclasses.dataclass(frozen=True)
class Floor:
    """What a recipe must reach.

    Attributes:
      max_abs: largest difference, in units of the output's peak where that is above 1.
      relative_rms: root mean square of the difference over that of the output.
      psnr_db: of a picture, against JAX float32.
    """

    max_abs: float
    relative_rms: float
    psnr_db: float


FLOORS = {
    "fp32": Floor(2e-5, 2e-5, 40.0),
    "fp16": Floor(2e-2, 5e-3, 38.0),
    "int8_dynamic": Floor(np.inf, 0.2, 25.0),
    "int8_static": Floor(np.inf, 0.2, 30.0),
    "int4_weights": Floor(np.inf, 0.5, 20.0),
}


@dataclasses.dataclass(frozen=True)
class Parity:
    """Worst differences over the cases."""

    max_abs: float
    relative_rms: float
    peak: float
    passed: bool


@dataclasses.dataclass(frozen=True)
class Case:
    """One input, as the flax module takes it and as the graph takes it.

    Attributes:
      kept: see `meaningful`.
    """

    model: tuple[np.ndarray, ...]
    graph: dict[str, np.ndarray]
    kept: np.ndarray | None = None


def case(component: Component, config: ModelConfig, sizes: Sizes, text_dim: int, seed: int) -> Case:
    """Plausible random inputs: normal latents and states, images in [-1, 1], a text with a padded tail.

    Args:
      text_dim: number of token ids of the text encoder for component "text", else unused.
    """
    rng = np.random.default_rng(seed)
    chat = component == "text" and config.text.encoder == "qwen3_vl"
    b, s = sizes.batch, sizes.chat_length if chat else sizes.text_length
    h, w = sizes.latent(config)
    mask = np.ones((b, s), np.float32)
    mask[:, max(1, s - s // 4) :] = 0.0
    bias = (1.0 - mask) * np.float32(MASK_BIAS)
    if chat:
        whole = np.concatenate([np.ones((b, GENERATE_CHAT.dropped_tokens), np.float32), mask], 1)
        ids = rng.integers(0, text_dim, whole.shape).astype(np.int32)
        return Case((ids, whole), {"token_ids": ids}, mask[..., None])
    if component == "text":
        ids = rng.integers(0, text_dim, (b, s)).astype(np.int32)
        return Case((ids, mask), {"token_ids": ids, "text_bias": bias})
    if component == "vae_encoder":
        image = rng.uniform(-1, 1, (b, sizes.height, sizes.width, 3)).astype(np.float32)
        return Case((image,), {"image": image})
    if component == "vae_decoder":
        latents = rng.standard_normal((b, h, w, config.vae.latent_channels)).astype(np.float32)
        return Case((latents,), {"latents": latents})
    unet = config.unet
    columns = 2 * w if unet.condition_layout == "width" else w
    sample = rng.standard_normal((b, h, columns, unet.in_channels)).astype(np.float32)
    text = rng.standard_normal((b, s, unet.text_dim)).astype(np.float32)
    timestep = rng.uniform(0, flow.TIMESTEPS, (b,)).astype(np.float32)
    size = np.tile(np.float32([[sizes.width, sizes.height]]), (b, 1))
    graph = {
        "sample": sample,
        "time_features": sinusoid(timestep, unet.block_out_channels[0]),
        "size_features": sinusoid(size.reshape(-1), unet.size_embed_dim).reshape(b, -1),
        "text": text,
        "text_bias": bias,
    }
    return Case((sample, timestep, text, mask, size), graph)


def reference(
    component: Component, config: ModelConfig, params: Any, text: TextConfig | None = None
) -> Callable[..., np.ndarray]:
    """The flax module of a component as a jitted function of `Case.model`."""
    if component == "text" and isinstance(text, TextTowerConfig):
        return _text_tower(text, params)
    if component == "unet":
        module, method = UNet(config.unet), None
    elif component == "text":
        module, method = minilm.MiniLM(text or minilm.MiniLMConfig()), None
    else:
        module, method = VAE(config.vae), {"vae_encoder": "encode", "vae_decoder": "decode"}[component]
    apply = jax.jit(functools.partial(module.apply, method=method))
    return lambda *inputs: np.asarray(apply({"params": params}, *inputs))


def _text_tower(config: TextTowerConfig, params: Any) -> Callable[..., np.ndarray]:
    tower = TextTower(config)

    def states(params: Any, ids: jax.Array, mask: jax.Array, positions: jax.Array) -> jax.Array:
        embedded = jnp.asarray(params["embed_tokens"]["embedding"])[ids]
        return tower.apply({"params": params}, embedded, positions, mask)[:, GENERATE_CHAT.dropped_tokens :]

    apply = jax.jit(states)
    return lambda ids, mask: np.asarray(apply(params, ids, mask, rope.text_positions(mask)))


def meaningful(inputs: Mapping[str, np.ndarray], output: np.ndarray, kept: np.ndarray | None = None) -> np.ndarray:
    """The output with zeros where it has no meaning: text states of padding.

    Args:
      kept: (b, s, 1), 0 at padding, of a chat, whose inputs do not say.
    """
    if kept is None and {"token_ids", "text_bias"} <= inputs.keys():
        kept = (inputs["text_bias"] == 0.0)[..., None].astype(np.float32)
    return output if kept is None else output * kept


def relative_rms(wanted: np.ndarray, found: np.ndarray) -> float:
    """Root mean square of the difference over that of what is wanted."""
    return float(np.sqrt(np.square(wanted - found).mean() / np.maximum(np.square(wanted).mean(), 1e-12)))


def measure(wanted: list[np.ndarray], found: list[np.ndarray], floor: Floor) -> Parity:
    """Worst differences of outputs. A value that is not finite never passes."""
    pairs = list(zip(wanted, found, strict=True))
    # Of numpy: Python's `max` drops a NaN that is not the first.
    max_abs = float(np.max([np.abs(a - b).max() for a, b in pairs]))
    relative = float(np.max([relative_rms(a, b) for a, b in pairs]))
    peak = float(np.max([np.abs(a).max() for a in wanted]))
    passed = max_abs <= floor.max_abs * max(1.0, peak) and relative <= floor.relative_rms
    return Parity(max_abs, relative, peak, bool(passed and np.isfinite(max_abs)))


def compare(
    component: Component,
    config: ModelConfig,
    sizes: Sizes,
    load: Callable[[], tuple[Any, TextConfig | None]],
    open_converted: Callable[[], Callable[..., np.ndarray]],
    floor: Floor,
) -> Parity:
    """Runs one converted component beside its flax module on the same random inputs.

    Args:
      load: gives the flax module's parameters, and the config of the text encoder for component "text".
      open_converted: gives the component as a function of its inputs by name, once the parameters are let go.
    """
    params, text = load()
    vocabulary = text.vocab_size if text else 0
    cases = [case(component, config, sizes, vocabulary, seed) for seed in range(CASES)]
    run = reference(component, config, params, text)
    wanted = [meaningful(c.graph, run(*c.model), c.kept) for c in cases]
    del run, params
    converted = open_converted()
    found = [meaningful(c.graph, converted(**c.graph), c.kept) for c in cases]
    return measure(wanted, found, floor)


def picture_psnr(
    config: ModelConfig,
    params: dict[str, Any],
    runtime: Runtime,
    prompt: str,
    *,
    source: np.ndarray | None = None,
    steps: int = 4,
    seed: int = 0,
) -> float:
    """PSNR in dB of a picture made by the runtime beside the one of the JAX sampler, both in [-1, 1]."""
    wanted = reference_picture(config, params, runtime, prompt, source=source, steps=steps, seed=seed)
    found = runtime.generate(prompt, source, steps=steps, seed=seed)
    return pictures.psnr(np.clip(wanted, -1, 1), np.clip(found, -1, 1))


def reference_picture(
    config: ModelConfig,
    params: dict[str, Any],
    runtime: Runtime,
    prompt: str,
    *,
    source: np.ndarray | None,
    steps: int,
    seed: int,
) -> np.ndarray:
    """(H, W, 3) by the JAX sampler in float32, at the runtime's size. Text states are computed in JAX too."""
    height, width = runtime.height, runtime.width
    h, w = height // config.vae.downsampling, width // config.vae.downsampling
    vae = functools.partial(jax.jit(VAE(config.vae).apply, static_argnames="method"), {"params": params["vae"]})
    editing = source is not None

    read = reference("text", config, params["text"], params["text_config"])

    def encode(task: str, words: str) -> sampler.TextStatesMask:
        ids, bias = runtime.tokens(task, words)
        mask = (bias == 0.0).astype(np.float32)
        template = np.ones((1, ids.shape[1] - mask.shape[1]), np.float32)  # of a chat, which the states leave out
        states = read(ids, np.concatenate([template, mask], 1))
        return sampler.TextStatesMask(jnp.asarray(states * mask[..., None]), jnp.asarray(mask))

    prompt_states, null = encode("edit" if editing else "generate", prompt), encode("null", "")
    noise = sampler.noise_from_seeds([seed], (h, w, config.vae.latent_channels))
    source_latents = vae(source[None], method="encode") if editing else jnp.zeros_like(noise)
    guided = guidance.is_guided(editing, config.guidance_scale, config.image_guidance_scale)
    plan = guidance.branches(editing, guided)
    conditioning = sampler.condition(plan, prompt_states, null, source_latents)
    unet, layout = UNet(config.unet), config.unet.condition_layout

    def run(weights: Any, *args: Any) -> jax.Array:
        return sampler.sample(functools.partial(unet.apply, {"params": weights}), *args, layout=layout)[0]

    final = jax.jit(run)(
        params["unet"],
        noise,
        conditioning,
        jnp.asarray([[width, height]], jnp.float32),
        jnp.asarray(flow.sampling_sigmas(steps, flow.shift_mu(config.scheduler, h, w))),
        config.guidance_scale,
        config.image_guidance_scale,
    )
    return np.asarray(vae(final, method="decode"))[0]
