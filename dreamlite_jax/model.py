"""The model as a user holds it: load, encode, sample, decode. `sample` and `evaluate` stand on this."""

import contextlib
import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from PIL import Image

from dreamlite_jax import model_folder, pictures, released
from dreamlite_jax.config import ModelConfig, image_size
from dreamlite_jax.diffusion import flow, guidance, sampler
from dreamlite_jax.errors import UserError
from dreamlite_jax.models.unet import UNet
from dreamlite_jax.models.vae import VAE
from dreamlite_jax.text.encoder import PromptEncoder, PromptRequest, PromptStates
from dreamlite_jax.training import sharding
from dreamlite_jax.training.config import MeshConfig


class Generated(NamedTuple):
    """Images (b, H, W, 3) in [-1, 1], final latents (b, h, w, c), data predicted at each step (steps, b, h, w, c)."""

    images: np.ndarray
    latents: np.ndarray
    trajectory: np.ndarray


Progress = Callable[[int, int], None]  # (steps begun, steps in all), from a thread of JAX


class Model:
    """U-Net, autoencoder and text encoder of one model folder. Arrays are NHWC, float32 in and out."""

    def __init__(
        self, config: ModelConfig, params: dict[str, Any], encoder: Callable[[], PromptEncoder], dtype=jnp.float32
    ):
        """`encoder` is called once, when the first prompt is encoded."""
        self.config = config
        self._load_encoder = encoder
        self._unet, self._vae = UNet(config.unet, dtype), VAE(config.vae, dtype)
        mesh = sharding.make_mesh(MeshConfig())
        self._devices = mesh.devices.size
        self._batch, self._replicated = sharding.batch_sharding(mesh), sharding.replicated(mesh)
        self._params = jax.device_put(params, self._replicated)
        self._velocity = jax.jit(self._apply_unet)
        self._encode = jax.jit(lambda p, x: self._vae.apply({"params": p}, x, method="encode"))
        self._decode = jax.jit(lambda p, z: self._vae.apply({"params": p}, z, method="decode"))
        self._sample = jax.jit(self._run_sampler, static_argnames="reporting")
        self._reports, self._listening = threading.Lock(), None

    @functools.cached_property
    def encoder(self) -> PromptEncoder:
        return self._load_encoder()

    def velocity(self, sample, timestep, text, mask, time_ids) -> np.ndarray:
        """Velocity of a canvas.

        Args:
          sample: (b, h, 2w, c). timestep: (b,) in 0..1000. text: (b, s, d). mask: (b, s), 1 = keep.
          time_ids: (b, 2), (width, height) of one panel in pixels.
        """
        arrays = [jnp.asarray(x, jnp.float32) for x in (sample, timestep, text, mask, time_ids)]
        return np.asarray(self._velocity(self._params["unet"], *arrays))

    def encode_images(self, images) -> np.ndarray:
        """(b, H, W, 3) in [-1, 1] to latents (b, H/8, W/8, c)."""
        return self._in_batches(self._encode, self._params["vae"], np.asarray(images, np.float32))

    def decode_latents(self, latents) -> np.ndarray:
        """(b, h, w, c) to images (b, 8h, 8w, 3), not clipped."""
        return self._in_batches(self._decode, self._params["vae"], np.asarray(latents, np.float32))

    def encode_prompts(self, prompts: Sequence[str], images: Sequence[Image.Image] | None = None) -> PromptStates:
        """Text states (b, s, d) and mask (b, s); with images the prompts are edit instructions."""
        if images is None:
            return self.encoder.encode([PromptRequest("generate", prompt) for prompt in prompts])
        return self.encoder.encode([PromptRequest("edit", p, i) for p, i in zip(prompts, images, strict=True)])

    def generate(self, prompts: Sequence[str], **options: Any) -> np.ndarray:
        """Images (b, H, W, 3) in [-1, 1], clipped; the options are those of `run`."""
        return self.run(prompts, **options).images

    def run(
        self,
        prompts: Sequence[str],
        *,
        images: Sequence[Image.Image] | None = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        width: int | None = None,
        height: int | None = None,
        seeds: Sequence[int] | None = None,
        latents: np.ndarray | None = None,
        progress: Progress | None = None,
    ) -> Generated:
        """Generates from prompts, or edits `images` by them.

        Args:
          prompts: one an image; several images of a prompt are the prompt several times (it is encoded once).
          images: sources, squashed to (width, height).
          guidance_scale, image_guidance_scale: at 1 (an edit: both at 1) there is no guidance and one forward pass a
            step, as a distilled model wants. The second is for edits.
          width, height: pixels; see `config.image_size` for those not given.
          seeds: one an image; an image depends on its own seed alone. Default 0, 1, ….
          latents: (b, h, w, c) start noise, instead of seeds.
          progress: told of every step as it begins; the images are the same with and without.

        Raises:
          UserError: a size the network cannot take, an empty or over-long prompt, lists of different lengths.
        """
        config = self.config
        steps = config.steps if steps is None else steps
        guidance_scale = config.guidance_scale if guidance_scale is None else guidance_scale
        if image_guidance_scale is None:
            image_guidance_scale = config.image_guidance_scale
        for name, scale in (("guidance_scale", guidance_scale), ("image_guidance_scale", image_guidance_scale)):
            if not math.isfinite(scale):
                raise UserError(f"{name} is {scale}; it must be a finite number")
        count = len(prompts)
        if not count:
            raise UserError("prompts is empty; it needs at least one")
        if images is not None and len(images) != count:
            raise UserError(f"{len(images)} images for {count} prompts; each prompt needs its own")
        width, height = self._size(width, height, images)
        h, w = height // config.vae.downsampling, width // config.vae.downsampling
        sigmas = flow.sampling_sigmas(steps, flow.shift_mu(config.scheduler, h, w))
        noise = self._start_noise(count, (h, w, config.vae.latent_channels), seeds, latents)

        editing = images is not None
        plan = guidance.branches(editing, guidance.is_guided(editing, guidance_scale, image_guidance_scale))
        conditioning = self._condition(plan, prompts, images, width, height, noise)
        sizes = np.tile(np.asarray([[width, height]], np.float32), (count, 1))
        noise, sizes = (self._place(x) for x in (noise, sizes))
        inputs = (noise, conditioning, sizes, sigmas, float(guidance_scale), float(image_guidance_scale))
        with contextlib.nullcontext() if progress is None else self._reporting(progress, sigmas):
            final, trajectory = self._sample(self._params["unet"], *inputs, reporting=progress is not None)
            final = np.asarray(final)
        return Generated(np.clip(self.decode_latents(final), -1, 1), final, np.asarray(trajectory))

    def _size(self, width: int | None, height: int | None, images: Sequence[Image.Image] | None) -> tuple[int, int]:
        """The one size of a batch."""
        if images is None:
            return image_size(self.config, width, height)
        sizes = {image_size(self.config, width, height, image.size) for image in images}
        if len(sizes) > 1:
            raise UserError(
                f"the sources have {len(sizes)} sizes ({', '.join(f'{w}x{h}' for w, h in sorted(sizes)[:3])}…) and a "
                "batch has one; give width and height, or edit them one by one"
            )
        return sizes.pop()

    def _start_noise(self, count: int, shape: tuple[int, int, int], seeds, latents) -> np.ndarray:
        if latents is not None:
            if np.shape(latents) != (count, *shape):
                raise UserError(
                    f"latents has shape {np.shape(latents)}; {count} prompts at this size need {(count, *shape)}"
                )
            return np.asarray(latents, np.float32)
        seeds = list(range(count)) if seeds is None else list(seeds)
        if len(seeds) != count:
            raise UserError(f"{len(seeds)} seeds for {count} prompts; each image needs its own")
        for seed in seeds:
            if not 0 <= seed < 2**32:
                raise UserError(f"seed {seed} is out of range; it must be from 0 to {2**32 - 1}")
        return np.asarray(sampler.noise_from_seeds(seeds, shape))

    def _condition(self, plan, prompts, images, width, height, noise) -> sampler.Conditioning:
        count, task = len(prompts), "generate" if images is None else "edit"
        sources = [None] * count if images is None else images
        requests = [PromptRequest(task, p, i) for p, i in zip(prompts, sources, strict=True)]
        if any(not branch.text for branch in plan):
            # An encoder that sees pictures is given the source in every branch, in the one with a blank panel too.
            requests += [PromptRequest("null", "", i) for i in sources]
        encoded = self.encoder.encode(requests)  # together, so that all have one length
        parts = [
            sampler.TextStatesMask(encoded.states[i : i + count], encoded.mask[i : i + count])
            for i in range(0, len(requests), count)
        ]
        source = np.zeros_like(noise)
        if images is not None:
            source = self.encode_images(np.stack([pictures.fit(image, width, height) for image in images]))
        return sampler.condition(plan, parts[0], parts[-1], jnp.asarray(source))

    def _apply_unet(self, params, *inputs):
        return self._unet.apply({"params": params}, *inputs)

    def _run_sampler(
        self, params, noise, conditioning, sizes, sigmas, guidance_scale, image_guidance_scale, *, reporting
    ):
        def velocity(canvas, timestep, *inputs):
            if reporting:
                jax.debug.callback(self._report, timestep[0])
            return self._apply_unet(params, canvas, timestep, *inputs)

        return sampler.sample(
            velocity, noise, conditioning, sizes, sigmas, guidance_scale, image_guidance_scale,
            layout=self.config.unet.condition_layout,
        )  # fmt: skip

    @contextlib.contextmanager
    def _reporting(self, progress: Progress, sigmas: np.ndarray) -> Iterator[None]:
        """While open, the steps of the compiled sampler are told to `progress`; one run at a time."""
        with self._reports:
            self._listening = progress, flow.TIMESTEPS * sigmas[:-1]
            try:
                yield
                jax.effects_barrier()  # the last report has been made
            finally:
                self._listening = None

    def _report(self, timestep: np.ndarray) -> None:
        if self._listening:
            progress, timesteps = self._listening
            progress(int(np.abs(timesteps - timestep).argmin()) + 1, len(timesteps))

    def _place(self, x: np.ndarray) -> jax.Array:
        """Split over the devices where the batch divides, else on each."""
        return jax.device_put(x, self._batch if len(x) % self._devices == 0 else self._replicated)

    def _in_batches(self, function, params, x: np.ndarray, size: int = 64) -> np.ndarray:
        parts = [np.asarray(function(params, self._place(x[i : i + size]))) for i in range(0, len(x), size)]
        return np.concatenate(parts)


def load_config(directory: str | Path) -> ModelConfig:
    """What `load_model` would load: a folder of ours, a training workdir or a diffusers DreamLite folder."""
    directory = model_folder.find_model(directory)
    return (released if released.is_released(directory) else model_folder).load_config(directory)


def load_model(directory: str | Path, *, dtype: DTypeLike = jnp.float32, text_dtype: DTypeLike = jnp.bfloat16) -> Model:
    """The model of a folder: one of ours, or a diffusers DreamLite folder, which is converted on the way in.

    Args:
      dtype: of the computation of U-Net and autoencoder; their weights are float32.
      text_dtype: of Qwen3-VL's weights and computation (bfloat16 as released). MiniLM is always float32.

    Raises:
      UserError: not a model folder, an incomplete or damaged one, weights of another architecture.
    """
    directory = model_folder.find_model(directory)
    config = load_config(directory)
    if released.is_released(directory):
        params = {name: released.load_params(directory, name, config) for name in model_folder.COMPONENTS}
    else:
        params = {name: model_folder.load_params(directory, name) for name in model_folder.COMPONENTS}

    def encoder() -> PromptEncoder:
        from dreamlite_jax.text.cache import CachedEncoder
        from dreamlite_jax.text.load import load_encoder

        loaded = load_encoder(config.text, directory, dtype=text_dtype)
        small = config.text.encoder == "minilm"  # and does not look at pictures
        return CachedEncoder(loaded, capacity=4096 if small else 256, image_in_key=not small)

    return Model(config, params, encoder, dtype)
