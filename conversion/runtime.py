"""Text to image and edit from LiteRT files alone: the reference loop for apps. Needs numpy, Pillow, tokenizers, LiteRT.

Command: python -m conversion.runtime --model LITERT_DIR --prompt TEXT [--image PNG] --output PNG
Where the text encoder is not in the folder, or would have to read the picture: --states FILE instead of --prompt.

Nothing here imports JAX. Weights are mapped from the files; components are loaded when needed and released after use.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import sys
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dreamlite_jax import cli, finite, pictures, settings
from dreamlite_jax.config import ModelConfig, from_dict
from dreamlite_jax.diffusion.schedule import TIMESTEPS, sampling_sigmas, shift_mu
from dreamlite_jax.errors import UserError
from dreamlite_jax.text.templates import clean_prompt

from . import extras
from .noise import start_noise
from .resources import bounded_threads, peak_memory_bytes

FORMAT = "dreamlite-litert"
FORMAT_VERSION = 2
SIGNATURE = "serving_default"
STATES = ("task", "prompt", "prompt_states", "prompt_mask", "null_states", "null_mask")  # what --states holds
OWN_STATES = "compute its states with python -m conversion.states and give them with --states"


class Runtime:
    """A folder of .tflite files, ready to generate.

    Args:
      folder: what `conversion.to_litert --component all` wrote.
      threads: of the CPU kernels; 0: one for each core, and never more.
      observer: called with component, inputs and output of every call; calibration listens here.
      keep_loaded: whether components stay in memory between uses; off, the peak is that of the largest one.

    Attributes:
      load_seconds: of the first load of every component so far.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        threads: int = 0,
        keep_loaded: bool = False,
        observer: Callable[[str, dict[str, np.ndarray], np.ndarray], None] | None = None,
    ):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.config = from_dict(ModelConfig, self.manifest["config"], f"{self.folder}/model.json: config")
        sizes = self.manifest["sizes"]
        self.height, self.width, self.text_length, self.batch = (
            sizes[name] for name in ("height", "width", "text_length", "batch")
        )
        self.load_seconds: dict[str, float] = {}
        self._threads = bounded_threads(threads)
        extras.check("the LiteRT runtime", extras.LITERT)
        self._keep = keep_loaded
        self._observer = observer
        self._loaded: dict[str, Callable[..., np.ndarray]] = {}
        self._prompts: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}

    def generate(
        self,
        prompt: str,
        image: Image.Image | np.ndarray | None = None,
        *,
        steps: int | None = None,
        guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        seed: int = 0,
        report: Callable[[str], None] = lambda line: None,
    ) -> np.ndarray:
        """One image (H, W, 3), float32 around [-1, 1] and not clipped; an edit of `image` when there is one.

        Args:
          image: picture of any size, squashed to the panel; or an array (H, W, 3) in [-1, 1].
          steps, guidance_scale, image_guidance_scale: default: the model's own. At 1 (an edit: both at 1): none.

        Raises:
          UserError: a bad prompt, seed, number of steps or image; a component that was not converted; numbers on the
            way that are none (the message says where they begin).
        """
        config = self.config
        steps = config.steps if steps is None else steps
        text_scale = config.guidance_scale if guidance_scale is None else guidance_scale
        image_scale = config.image_guidance_scale if image_guidance_scale is None else image_guidance_scale
        for name, scale in (("guidance_scale", text_scale), ("image_guidance_scale", image_scale)):
            if not math.isfinite(scale):
                raise UserError(f"{name} is {scale}; it must be a finite number")
        h, w = self.height // config.vae.downsampling, self.width // config.vae.downsampling
        sigmas = sampling_sigmas(steps, shift_mu(config.scheduler, h, w))
        x = start_noise(seed, (1, h, w, config.vae.latent_channels))
        for name in ("unet", "vae_decoder", *(["vae_encoder"] if image is not None else [])):
            component_file(self.folder, self.manifest, name)  # before any work
        prompt_states = self.encode_prompt("generate" if image is None else "edit", prompt, report)
        blank = np.zeros_like(x)
        source = blank if image is None else self.encode_image(image)
        # Each guidance branch is (text states, text bias, condition latents); see `combine` for their order.
        plan = [(*prompt_states, source)]
        if text_scale != 1.0 or (image is not None and image_scale != 1.0):  # else the other branches cancel
            null = self.encode_prompt("null", "")
            plan = [(*null, blank), *([(*null, source)] if image is not None else []), *plan]
        sizes = sinusoid(np.float32([self.width, self.height]), config.unet.size_embed_dim).reshape(1, -1)
        with self._component("unet") as unet:
            for i, (now, after) in enumerate(itertools.pairwise(sigmas)):
                begin = time.perf_counter()
                time_features = sinusoid(np.float32([TIMESTEPS]) * now, config.unet.block_out_channels[0])
                velocities = self._velocities(unet, x, time_features, sizes, plan)
                x = x + (after - now) * combine(velocities, text_scale, image_scale)
                self._check(x, f"the latents after step {i + 1} of {steps}", "unet")
                report(f"step {i + 1}/{steps} {time.perf_counter() - begin:.2f} s")
        with self._component("vae_decoder") as decode:
            return self._check(decode(latents=self._rows(x))[0], "the picture", "vae_decoder")

    @functools.cached_property
    def tokenizer(self) -> "tokenizers.Tokenizer":
        """That of the text encoder, for prompts that it has not been given the states of."""
        component_file(self.folder, self.manifest, "text")
        from dreamlite_jax.text.words import open_tokenizer

        found = open_tokenizer(self.folder / "tokenizer.json", "the converted text encoder")
        found.encode_special_tokens = True  # "[SEP]" typed by a user is text
        return found

    @property
    def reads_pictures(self) -> bool:
        """Whether the model's text encoder reads the picture of an edit too, which its file here cannot."""
        return self.config.text.encoder == "qwen3_vl"

    def encode_prompt(
        self, task: str, prompt: str, report: Callable[[str], None] = lambda line: None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Text states (1, s, d) and text bias (1, s) of a prompt, remembered; `report` hears of what has no token."""
        if (task, prompt) not in self._prompts:
            ids, bias = self.tokens(task, prompt)
            if task != "null":
                from dreamlite_jax.text.words import unread

                if said := unread(self.tokenizer, prompt):
                    report(said)
            inputs = {"token_ids": ids} if "chat" in self.manifest else {"token_ids": ids, "text_bias": bias}
            with self._component("text") as encode:
                states = encode(**{name: self._rows(value) for name, value in inputs.items()})[:1]
            self._check(states, "the prompt's states", "text")
            self._remember(task, prompt, states, bias)
        return self._prompts[task, prompt]

    def read_states(self, path: Path) -> tuple[str, str]:
        """Takes the text states that `conversion.states` computed of a prompt; returns its task and the prompt.

        Raises:
          UserError: not such a file, or states of another width or number than these files take.
        """
        if not path.is_file():
            raise UserError(f"--states {path} does not exist; python -m conversion.states writes one")
        try:
            with np.load(path) as file:
                found = {name: file[name] for name in STATES}
                older = "after_norm" if self.config.text.encoder == "qwen3_vl" else ""  # of a file that does not say
                state = str(file["state"]) if "state" in file else older
        except (ValueError, KeyError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
            raise UserError(f"--states {path} is not a file of conversion.states: {error}") from None
        wanted = (1, self.text_length, self.config.unet.text_dim)
        for part in ("prompt", "null"):
            states, mask = found[f"{part}_states"], found[f"{part}_mask"]
            if states.shape != wanted or mask.shape != wanted[:2] or not np.isfinite(states).all():
                raise UserError(f"--states {path} has states {states.shape}; these files take {wanted}, finite")
        if state != (self.config.text.state or ""):
            raise UserError(
                f"--states {path} has text states {state}, but the model of {self.folder} reads those "
                f"{self.config.text.state}; compute them again: python -m conversion.states"
            )
        task, prompt = str(found["task"]), str(found["prompt"])
        for key, part in (((task, prompt), "prompt"), (("null", ""), "null")):
            bias = (1.0 - found[f"{part}_mask"]) * np.float32(self.manifest["mask_bias"])
            self._remember(*key, found[f"{part}_states"], bias.astype(np.float32))
        return task, prompt

    def _remember(self, task: str, prompt: str, states: np.ndarray, bias: np.ndarray) -> None:
        """Keeps a prompt's states, those of padding zero, at the length that the U-Net takes."""
        states = states.astype(np.float32) * (bias == 0.0)[..., None].astype(np.float32)
        padding = self.text_length - bias.shape[1]  # a chat without a picture has a limit of its own
        bias = np.pad(bias, ((0, 0), (0, padding)), constant_values=self.manifest["mask_bias"])
        self._prompts[task, prompt] = np.pad(states, ((0, 0), (0, padding), (0, 0))), bias

    def encode_image(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """Latents (1, h, w, c) of a picture."""
        pixels = image if isinstance(image, np.ndarray) else pictures.fit(image, self.width, self.height)
        if pixels.shape != (self.height, self.width, 3):
            raise UserError(f"image has shape {pixels.shape}; this model takes {(self.height, self.width, 3)}")
        with self._component("vae_encoder") as encode:
            latents = encode(image=self._rows(pixels[None].astype(np.float32)))[:1]
        return self._check(latents, "the source's latents", "vae_encoder")

    def tokens(self, task: str, prompt: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids, (1, s) or those of a whole chat, and text bias (1, s) of a prompt with the tag of its task.

        A chat keeps at most its limit of states, as the model's own encoder does, which cuts closing tokens there.

        Raises:
          UserError: an empty or over-long prompt; an edit, where the encoder would have to look at the picture too.
        """
        words = self.manifest["templates"][task] + clean_prompt(task, prompt)
        if task == "edit" and self.reads_pictures:
            raise UserError(
                f"{self.folder}: its text encoder is converted for prompts without a picture; for edits {OWN_STATES}"
            )
        ids, before, most = self.tokenizer.encode(words).ids, [], self.text_length
        if "chat" in self.manifest:
            chat = self.manifest["chat"]
            before, limit = chat["before"], chat["limit"]
            most = min(most, limit)
            ids = [*ids, *chat["after"]][: max(limit, len(ids))]
        if len(ids) > most:
            raise UserError(f"the prompt has {len(ids)} tokens and the limit is {most}; shorten it")
        padded = np.full((1, len(before) + most), self.manifest["pad_id"], np.int32)
        padded[0, : len(before) + len(ids)] = [*before, *ids]
        bias = np.full((1, most), self.manifest["mask_bias"], np.float32)
        bias[0, : len(ids)] = 0.0
        return padded, bias

    def _velocities(self, unet, x, time_features, sizes, plan) -> list[np.ndarray]:
        """Target-panel velocity of every branch, in as few calls of the network as its batch allows."""
        axis = 2 if self.config.unet.condition_layout == "width" else 3
        rows = []
        for start in range(0, len(plan), self.batch):
            some = plan[start : start + self.batch]
            some = some + some[-1:] * (self.batch - len(some))
            text, bias, condition = (np.concatenate(parts) for parts in zip(*some, strict=True))
            canvas = np.concatenate([self._rows(x), condition], axis)
            out = unet(
                sample=canvas,
                time_features=self._rows(time_features),
                size_features=self._rows(sizes),
                text=text,
                text_bias=bias,
            )
            rows += list(out[:, :, : x.shape[2]] if axis == 2 else out)
        return [row[None] for row in rows[: len(plan)]]

    def _check(self, values: np.ndarray, what: str, component: str) -> np.ndarray:
        """The values, which must all be finite: a picture of anything else is black."""
        if fault := finite.fault(values):
            raise UserError(
                f"{what}: {fault}; they come from {self.manifest['files'][component]}; convert the model again, "
                "if this file is of half precision or 8 bits with --recipe fp32"
            )
        return values

    def _rows(self, row: np.ndarray) -> np.ndarray:
        """One row repeated to the batch of the graphs."""
        return np.repeat(row, self.batch, axis=0)

    @contextlib.contextmanager
    def _component(self, name: str) -> Iterator[Callable[..., np.ndarray]]:
        """The named component as a function of its inputs; its memory is given back at the end."""
        if name not in self._loaded:
            begin = time.perf_counter()
            self._loaded[name] = self._observed(name, load_component(self.folder, self.manifest, name, self._threads))
            self.load_seconds.setdefault(name, time.perf_counter() - begin)
        try:
            yield self._loaded[name]
        finally:
            if not self._keep:
                del self._loaded[name]

    def _observed(self, name: str, run: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        if self._observer is None:
            return run

        def observed(**inputs: np.ndarray) -> np.ndarray:
            output = run(**inputs)
            self._observer(name, inputs, output)
            return output

        return observed


def load_component(folder: Path, manifest: dict[str, Any], name: str, threads: int) -> Callable[..., np.ndarray]:
    """A component's signature as a function of keyword arrays; it returns a copy of the one output."""
    from ai_edge_litert.interpreter import Interpreter

    path = component_file(folder, manifest, name)
    interpreter = Interpreter(str(path), num_threads=bounded_threads(threads))
    interpreter.allocate_tensors()  # here, so that the time of preparing weights counts as loading
    runner = interpreter.get_signature_runner(SIGNATURE)

    def run(**inputs: np.ndarray) -> np.ndarray:
        (output,) = runner(**inputs).values()
        return np.array(output)

    return run


def component_file(folder: Path, manifest: dict[str, Any], name: str) -> Path:
    """The file of a component. Raises `UserError` when the folder was made without it."""
    if name not in manifest["files"]:
        remedy = OWN_STATES if name == "text" else "convert the model again, with --component all"
        raise UserError(f"{folder} has no {name}; {remedy}")
    path = folder / manifest["files"][name]
    if not path.is_file():
        raise UserError(f"{path} does not exist, though model.json names it")
    return path


def read_manifest(folder: Path) -> dict[str, Any]:
    """`model.json` of a folder of LiteRT files. Raises `UserError` when it is not one."""
    path = folder / "model.json"
    if not path.is_file():
        raise UserError(f"{folder} has no model.json; it must be a folder written by conversion.to_litert")
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} is not of format {FORMAT!r}; convert the model first: python -m conversion.to_litert")
    if manifest["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"{path}: format_version is {manifest['format_version']}; this code reads {FORMAT_VERSION}: convert again"
        )
    text = manifest["config"].get("text", {})
    if text.get("encoder") == "qwen3_vl" and "state" not in text:
        raise UserError(
            f"{path}: config.text.state is missing: the files are of a version that gave Qwen3-VL's states after its "
            "final norm, while released weights read those before it; convert again"
        )
    return manifest


def sinusoid(x: np.ndarray, width: int) -> np.ndarray:
    """(b,) to (b, width): [cos, sin] of x times the frequencies 10000^(-i / half), i = 0..half-1."""
    half = width // 2
    frequencies = np.exp(np.float32(-math.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half))
    angles = x.astype(np.float32)[:, None] * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], -1)


def combine(velocities: Sequence[np.ndarray], guidance_scale: float, image_guidance_scale: float) -> np.ndarray:
    """Guided velocity of one, two (null, text) or three (null, image, image and text) branches."""
    if len(velocities) == 1:
        return velocities[0]
    text_scale, image_scale = np.float32(guidance_scale), np.float32(image_guidance_scale)
    if len(velocities) == 2:
        null, text = velocities
        return null + text_scale * (text - null)
    null, image, text = velocities
    return null + text_scale * (text - image) + image_scale * (image - null)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.documented("conversion.runtime", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="folder written by conversion.to_litert")
    words = parser.add_mutually_exclusive_group(required=True)
    words.add_argument("--prompt")
    words.add_argument("--states", type=Path, help="file of conversion.states, for a prompt that it has encoded")
    parser.add_argument("--image", type=Path, help="picture to edit")
    parser.add_argument("--output", type=Path, required=True, help="PNG to write")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance_scale", type=float)
    parser.add_argument("--image_guidance_scale", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=0, help="0: one for each core")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    cli.check_png("--output", args.output)
    runtime = Runtime(args.model, threads=args.threads)
    settings.check_source_stays(args.image, [args.output])
    begin, prompt = time.perf_counter(), args.prompt
    if args.states:
        task, prompt = runtime.read_states(args.states)
        if (task == "edit") != (args.image is not None):
            raise UserError(f"--states {args.states} is of task {task}; --image goes with edit, and with nothing else")
    image = pictures.read_picture(args.image) if args.image else None
    size = runtime.width, runtime.height
    about = settings.of_picture(runtime.config, prompt, args.image, vars(args), size, str(args.model))
    pixels = runtime.generate(
        prompt,
        image,
        steps=args.steps,
        guidance_scale=args.guidance_scale,
        image_guidance_scale=args.image_guidance_scale,
        seed=args.seed,
        report=lambda line: print(line, file=sys.stderr),
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    pictures.save_png(args.output, pixels, settings.as_text({**about, "seed": args.seed}))
    loads = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in runtime.load_seconds.items())
    print(f"first load: {loads}")
    print(f"{args.output}: {time.perf_counter() - begin:.2f} s in all, peak memory {peak_memory_bytes() / 1e6:.0f} MB")
    return 0


if __name__ == "__main__":
    cli.run(main)
