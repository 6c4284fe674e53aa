"""The model as a user holds it: load, encode, sample, decode. `sample` and `evaluate` stand on this."""

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from PIL import Image

from dreamlite_jax import arguments, finite, model_folder, pictures, released
from dreamlite_jax.config import ModelConfig, image_size
from dreamlite_jax.diffusion import flow, guidance, sampler
from dreamlite_jax.errors import UserError
from dreamlite_jax.models.unet import UNet
from dreamlite_jax.models.vae import VAE
from dreamlite_jax.parallel import sharding
from dreamlite_jax.parallel.config import MeshConfig
from dreamlite_jax.text.encoder import PromptEncoder, PromptRequest, PromptStates
from dreamlite_jax.text.load import unread
from dreamlite_jax.text.templates import clean_prompt
from dreamlite_jax.text.words import UnreadWords


class Generated(NamedTuple):
    """Images (b, H, W, 3) in [-1, 1], final latents (b, h, w, c), data predicted at each step (steps, b, h, w, c)."""

    images: np.ndarray
    latents: np.ndarray
    trajectory: np.ndarray


Progress = Callable[[int, int], None]  # (steps begun, steps in all), from a thread of JAX
BATCH_PIXELS, BATCH_LARGEST = 2**20, 64  # of a device, unless a batch size is given: a picture of 1024 px, 64 of 64 px
NO_MEMORY = (  # how XLA says so; its CPU kernels' is the last
    "RESOURCE_EXHAUSTED", "Out of memory", "out of memory", "bad_alloc", "YNNPACK operation failed"
)  # fmt: skip


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
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        with _allocating(f"the model's {size / 1e9:.1f} GB of weights"):
            self._params = jax.block_until_ready(jax.device_put(params, self._replicated))
        self._velocity = jax.jit(self._apply_unet)
        self._encode = jax.jit(lambda p, x: self._vae.apply({"params": p}, x, method="encode"))
        self._decode = jax.jit(lambda p, z: self._vae.apply({"params": p}, z, method="decode"))
        self._sample = jax.jit(self._run_sampler, static_argnames="reporting")
        self._reports, self._listening = threading.Lock(), None

    @functools.cached_property
    def encoder(self) -> PromptEncoder:
        return self._load_encoder()

    def velocity(self, sample, timestep, text, mask, time_ids) -> np.ndarray | jax.Array:
        """Velocity of a canvas. Inside `jax.jit` and `jax.grad` an array of JAX, else of numpy.

        Args:
          sample: (b, h, 2w, c). timestep: (b,) in 0..1000, or one for all. text: (b, s, d). mask: (b, s), 1 = keep.
          time_ids: (b, 2), (width, height) of one panel in pixels, or (2,) for all.
        """
        unet = self.config.unet
        sizes = {"c": unet.in_channels, "d": unet.text_dim, "2": 2}
        arrays = [
            arguments.tensor("sample", sample, "b h w c", sizes),
            arguments.rows("timestep", timestep, "b", sizes),
            arguments.tensor("text", text, "b s d", sizes),
            arguments.rows("mask", mask, "b s", sizes),
            arguments.rows("time_ids", time_ids, "b 2", sizes),
        ]
        return _on_host(self._velocity(self._params["unet"], *arrays))

    def encode_images(self, images) -> np.ndarray | jax.Array:
        """(b, H, W, 3) in [-1, 1], or of uint8, to latents (b, H/8, W/8, c). Inside `jax.jit` as `velocity`."""
        if getattr(images, "dtype", None) == np.uint8:
            images = jnp.asarray(images, jnp.float32) / 127.5 - 1.0
        images = arguments.tensor("images", images, "b H W 3", {"3": 3})
        side = self.config.vae.downsampling
        if images.shape[1] % side or images.shape[2] % side:
            raise UserError(f"images has shape {images.shape}; height and width must be multiples of {side}")
        return self._in_batches(self._encode, self._params["vae"], images)

    def decode_latents(self, latents) -> np.ndarray | jax.Array:
        """(b, h, w, c) to images (b, 8h, 8w, 3), not clipped. Inside `jax.jit` as `velocity`."""
        latents = arguments.tensor("latents", latents, "b h w c", {"c": self.config.vae.latent_channels})
        return self._in_batches(self._decode, self._params["vae"], latents)

    def encode_prompts(self, prompts: str | Sequence[str], images: Any = None) -> PromptStates:
        """Text states (b, s, d) and mask (b, s); with images (see `batches`) the prompts are edit instructions."""
        prompts, _ = arguments.prompts_and_seeds(prompts, None)
        sources = [None] * len(prompts) if images is None else arguments.sources(images, len(prompts))
        return self.encoder.encode(self._requests(prompts, sources))

    def generate(self, prompts: str | Sequence[str], **options: Any) -> np.ndarray:
        """Images (b, H, W, 3) in [-1, 1], clipped; the options are those of `batches`."""
        return self.run(prompts, **options).images

    def run(self, prompts: str | Sequence[str], **options: Any) -> Generated:
        """All pictures together, with latents and what is predicted along the way; the options of `batches`."""
        images, latents, trajectories = zip(*self.batches(prompts, **options), strict=True)
        return Generated(np.concatenate(images), np.concatenate(latents), np.concatenate(trajectories, axis=1))

    def batches(
        self,
        prompts: str | Sequence[str],
        *,
        images: Any = None,
        steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        width: int | None = None,
        height: int | None = None,
        seeds: int | Sequence[int] | None = None,
        latents: np.ndarray | None = None,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> Iterator[Generated]:
        """Generates from prompts, or edits `images` by them, some pictures at a time; each batch comes as it is drawn.

        Args:
          prompts: one an image; several images of a prompt are the prompt several times (it is encoded once). A text
            alone is one prompt, drawn once for each of the `seeds`.
          images: sources, one a prompt or one for all, squashed to (width, height): Pillow images, paths, or arrays
            (H, W, 3) of uint8 or of floats in [-1, 1], as `generate` gives them (rounded to 8 bits).
          guidance_scale, image_guidance_scale: at 1 (an edit: both at 1) there is no guidance and one forward pass a
            step, as a distilled model wants. The second is for edits.
          width, height: pixels; see `config.image_size` for those not given.
          seeds: one an image; an image depends on its own seed alone. Default 0, 1, ….
          latents: (b, h, w, c) start noise, instead of seeds.
          batch_size: pictures drawn at a time; default: about a megapixel a device. The last batch is filled up and so
            computed as the others are.
          progress: told of every step as it begins, over all batches; the images are the same with and without.

        Raises:
          UserError: an argument of another kind or number, a size the network cannot take, a prompt of which nothing
            can be read, all before the first batch; a prompt that is too long for the encoder; too little memory for
            a batch; numbers on the way that are none.

        Warns:
          UnreadWords: the text encoder does not know some of a prompt's words.
        """
        config = self.config
        prompts, seeds = arguments.prompts_and_seeds(prompts, seeds)
        count, task = len(prompts), "generate" if images is None else "edit"
        scales = [config.guidance_scale, config.image_guidance_scale]
        for i, (name, scale) in enumerate(
            (("guidance_scale", guidance_scale), ("image_guidance_scale", image_guidance_scale))
        ):
            scales[i] = scales[i] if scale is None else arguments.number(name, scale)
        steps = config.steps if steps is None else arguments.whole("steps", steps, 1)
        prompts = [clean_prompt(task, prompt) for prompt in prompts]
        for said in filter(None, (unread(config.text, prompt) for prompt in dict.fromkeys(prompts))):
            warnings.warn(said, UnreadWords, stacklevel=2)
        sources = [None] * count if images is None else arguments.sources(images, count)
        width, height = self._size(width, height, sources)
        if latents is not None:
            latents = self._given_noise(latents, count, width, height)
        size = (
            self.usual_batch_size(width, height) if batch_size is None else arguments.whole("batch_size", batch_size, 1)
        )
        size = min(size, count)
        sigmas = flow.sampling_sigmas(steps, flow.shift_mu(config.scheduler, *self._latent_shape(width, height)[:2]))
        plan = guidance.branches(task == "edit", guidance.is_guided(task == "edit", *scales))

        def drawn() -> Iterator[Generated]:
            for start in range(0, count, size):
                kept = min(size, count - start)
                rows = [*range(start, start + kept), *[count - 1] * (size - kept)]

                def report(step: int, of: int) -> None:
                    progress(start // size * of + step, -(-count // size) * of)  # noqa: B023 (called before the next)

                with _allocating(self._too_large(size, width, height)):
                    noise = (
                        latents[rows] if latents is not None else self._noise([seeds[i] for i in rows], width, height)
                    )
                    requests = self._requests([prompts[i] for i in rows], [sources[i] for i in rows])
                    made = self._draw(plan, requests, noise, width, height, sigmas, scales, progress and report)
                yield Generated(made.images[:kept], made.latents[:kept], made.trajectory[:, :kept])

        return drawn()

    def usual_batch_size(self, width: int, height: int) -> int:
        """Pictures of this size (pixels) that are drawn at a time unless another number is asked for."""
        return self._devices * min(BATCH_LARGEST, max(1, BATCH_PIXELS // (width * height)))

    def _draw(self, plan, requests, noise, width, height, sigmas, scales, progress) -> Generated:
        """One batch."""
        conditioning = self._condition(plan, requests, width, height, noise)
        sizes = np.tile(np.asarray([[width, height]], np.float32), (len(noise), 1))
        noise, sizes = (self._place(x) for x in (noise, sizes))
        inputs = (noise, conditioning, sizes, sigmas, *map(float, scales))
        with contextlib.nullcontext() if progress is None else self._reporting(progress, sigmas):
            final, trajectory = self._sample(self._params["unet"], *inputs, reporting=progress is not None)
            final, trajectory = np.asarray(final), np.asarray(trajectory)
        for step, predicted in enumerate(trajectory, 1):
            _check_finite(f"the U-Net's answer at step {step} of {len(trajectory)}", predicted)
        _check_finite("the final latents", final)
        images = _check_finite("the decoded picture", self.decode_latents(final))
        return Generated(np.clip(images, -1, 1), final, trajectory)

    def _too_large(self, count: int, width: int, height: int) -> str:
        """What is said of a batch that there is not the memory for."""
        asked = f"{count} pictures at a time of" if count > 1 else "a picture of"
        lower = "batch_size, or width and height" if count > 1 else "width and height"
        native = self.config.native_size
        return f"{asked} {width}x{height} pixels (the model was trained for {native}x{native}); lower {lower}"

    def _size(self, width: int | None, height: int | None, sources: Sequence[Image.Image | None]) -> tuple[int, int]:
        """The one size of a batch."""
        width, height = (
            side if side is None else arguments.whole(name, side, 0)
            for name, side in (("width", width), ("height", height))
        )
        sizes = {image_size(self.config, width, height, source and source.size) for source in sources}
        if len(sizes) > 1:
            raise UserError(
                f"the sources have {len(sizes)} sizes ({', '.join(f'{w}x{h}' for w, h in sorted(sizes)[:3])}…) and a "
                "batch has one; give width and height, or edit them one by one"
            )
        return sizes.pop()

    def _latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        vae = self.config.vae
        return height // vae.downsampling, width // vae.downsampling, vae.latent_channels

    def _noise(self, seeds: Sequence[int], width: int, height: int) -> np.ndarray:
        return np.asarray(sampler.noise_from_seeds(seeds, self._latent_shape(width, height)))

    def _given_noise(self, latents: Any, count: int, width: int, height: int) -> np.ndarray:
        shape = (count, *self._latent_shape(width, height))
        if np.shape(latents) != shape:
            raise UserError(f"latents has shape {np.shape(latents)}; {count} prompts at this size need {shape}")
        found = np.asarray(arguments.tensor("latents", latents, "b h w c", {}))
        if fault := finite.fault(found):
            raise UserError(f"latents: {fault}")
        return found

    def _requests(self, prompts: Sequence[str], sources: Sequence[Image.Image | None]) -> list[PromptRequest]:
        pairs = zip(prompts, sources, strict=True)
        return [PromptRequest("generate" if image is None else "edit", prompt, image) for prompt, image in pairs]

    def _condition(self, plan, requests, width, height, noise) -> sampler.Conditioning:
        count, sources = len(requests), [request.image for request in requests]
        if any(not branch.text for branch in plan):
            # An encoder that sees pictures is given the source in every branch, in the one with a blank panel too.
            requests = [*requests, *(PromptRequest("null", "", image) for image in sources)]
        encoded = self.encoder.encode(requests)  # together, so that all have one length
        _check_finite("the text encoder's answer", encoded.states)
        parts = [
            sampler.TextStatesMask(encoded.states[i : i + count], encoded.mask[i : i + count])
            for i in range(0, len(requests), count)
        ]
        source = np.zeros_like(noise)
        if sources[0] is not None:
            source = self.encode_images(np.stack([pictures.fit(image, width, height) for image in sources]))
            _check_finite("the source's latents", source)
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

    def _in_batches(self, function, params, x: jax.Array, size: int = 64) -> np.ndarray | jax.Array:
        if isinstance(x, jax.core.Tracer):
            return function(params, x)
        parts = [np.asarray(function(params, self._place(x[i : i + size]))) for i in range(0, len(x), size)]
        return np.concatenate(parts)


@contextlib.contextmanager
def _allocating(what: str) -> Iterator[None]:
    """Answers for memory that is not there, of the host or a device; other failures stay as they are."""
    try:
        yield
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, MemoryError) or any(said in str(error) for said in NO_MEMORY):
            raise UserError(f"there is not enough memory for {what}") from error
        raise


def _on_host(array: jax.Array) -> np.ndarray | jax.Array:
    """As numpy, but for what JAX is tracing."""
    return array if isinstance(array, jax.core.Tracer) else np.asarray(array)


def _check_finite(what: str, values: np.ndarray) -> np.ndarray:
    """The values, which must all be finite: a picture of anything else is black."""
    if fault := finite.fault(values):
        raise UserError(
            f"{what}: {fault}; nothing is drawn. Weights are at fault, of a training that diverged or larger than the "
            "precision of the computation holds (load_model: dtype)"
        )
    return values


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
