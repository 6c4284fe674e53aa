"""A page to generate and edit in a browser: python -m dreamlite_jax.app [--model DIR] [--port N]. Needs `[app]`.

DIR is what `dreamlite_jax.sample` takes. The page is then at http://127.0.0.1:7860; nothing is sent elsewhere. Pictures
carry their settings, as those of `sample`. They and all uploads are kept until the command ends (Ctrl-C or SIGTERM).
"""

import argparse
import atexit
import contextlib
import contextvars
import html
import importlib.util
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dreamlite_jax import cli, pictures, settings
from dreamlite_jax.config import ModelConfig, image_size
from dreamlite_jax.errors import UserError

MOST_IMAGES = 8
MOST_BYTES = "200mb"  # of an upload
SMALL = 256  # px: pictures of models below it are shown enlarged, with hard edges
# A gallery grows with its pictures; as it is, it scrolls inside the page and cuts a square one off.
CSS = ".grid-wrap.fixed-height { min-height: 12rem !important; max-height: none !important; overflow-y: visible; }\n"
SMALL_CSS = ".gallery-container img, .image-container img { image-rendering: pixelated; }\n"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = cli.documented("dreamlite_jax.app", __doc__)
    cli.add_model(parser)
    parser.add_argument("--port", type=int, default=7860)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in; there is no password")
    return parser.parse_args(argv)


class Studio:
    """What the page's buttons do: one model, and a folder for the pictures made while the page is served."""

    def __init__(self, model: Any, name: str, folder: Path):
        """`model` is a `dreamlite_jax.model.Model`; `name` goes into the pictures' metadata."""
        self.model, self.name, self.folder = model, name, folder
        self._made = 0

    def run(
        self,
        prompt: str,
        source: str | None,
        width: float,
        height: float,
        steps: float,
        guidance_scale: float,
        image_guidance_scale: float,
        seed: float | None,
        count: float,
        *,
        editing: bool,
        progress: Callable[[int, int], None] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """(pictures made, what was predicted at each step for the first), each as (path, caption).

        Numbers come from sliders and boxes, which give floats, or None when emptied. `source` is the file of an upload,
        called by its name alone; `say` is told what is assumed of it, and which words the model cannot read.

        Raises:
          UserError: whatever `Model.run` refuses; an edit without a source; an emptied number box.
        """
        if seed is None or seed != int(seed):
            raise UserError(f"seed is {seed}; it must be a whole number from 0 to {2**32 - 1}")
        picture = None
        if editing:
            if not source:
                raise UserError("there is no picture to edit; choose one first")
            picture = pictures.read_picture(source, say, name=Path(source).name)
        from dreamlite_jax.text.load import unread  # with JAX, which comes with the model
        from dreamlite_jax.text.templates import clean_prompt

        said = unread(self.model.config.text, clean_prompt("edit" if editing else "generate", prompt))
        if said and say:
            say(said)
        seeds = [int(seed) + i for i in range(int(count))]
        chosen = {
            "steps": int(steps), "guidance_scale": float(guidance_scale),
            "image_guidance_scale": float(image_guidance_scale),
        }  # fmt: skip
        size = int(width), int(height)
        about = settings.of_picture(
            self.model.config, prompt, source if editing else None, chosen, size, self.name,
            shown=Path(source).name if editing else None,
        )  # fmt: skip
        result = self.model.run(
            [prompt] * len(seeds),
            images=[picture] * len(seeds) if editing else None,
            seeds=seeds,
            progress=progress,
            width=size[0],
            height=size[1],
            **chosen,
        )
        self._made += 1
        made = [
            (self._save(f"{seed}.png", image, {**about, "seed": seed}), f"seed {seed}")
            for seed, image in zip(seeds, result.images, strict=True)
        ]
        shown = [
            (self._save(f"step_{i:02d}.png", image, {**about, "seed": seeds[0], "step": i}), f"step {i}")
            for i, image in enumerate(self.model.decode_latents(result.trajectory[:, 0]), 1)
        ]
        return made, shown

    def _save(self, name: str, image: np.ndarray, about: dict[str, Any]) -> str:
        folder = self.folder / f"{self._made:05d}"
        folder.mkdir(exist_ok=True)
        pictures.save_png(folder / name, image, settings.as_text(about))
        return str(folder / name)


def build(studio: Studio) -> Any:
    """The page, a `gradio.Blocks`."""
    import gradio as gr

    config: ModelConfig = studio.model.config

    def action(editing: bool, progress: gr.Progress, *inputs: Any) -> Any:
        here = contextvars.copy_context()  # steps are reported from a thread of JAX, which has no request of its own

        def report(step: int, steps: int) -> None:
            here.copy().run(progress, (step - 1, steps), desc="sampling", unit="steps")

        with complaints(gr):
            return studio.run(*inputs, editing=editing, progress=report, say=say)

    def say(note: str) -> None:
        gr.Warning(html.escape(note), title="Please note", duration=None)

    def sizes(source: str) -> tuple[int, int]:
        with complaints(gr):
            return source_size(config, source)

    # Gradio counts the parameters, and gives a `gr.Progress` where it finds one among the defaults.
    def generate(prompt, width, height, steps, guidance, image_guidance, seed, count, progress=gr.Progress()):  # noqa: B008
        return action(False, progress, prompt, None, width, height, steps, guidance, image_guidance, seed, count)

    def edit(prompt, source, width, height, steps, guidance, image_guidance, seed, count, progress=gr.Progress()):  # noqa: B008
        return action(True, progress, prompt, source, width, height, steps, guidance, image_guidance, seed, count)

    with gr.Blocks(title="DreamLite", analytics_enabled=False) as page:
        gr.Markdown(f"# DreamLite\nmodel `{studio.name}`, trained for {config.native_size} px")
        for task, function in (("generate", generate), ("edit", edit)):
            with gr.Tab(task.capitalize(), id=task, elem_id=f"{task}_tab"), gr.Row():
                with gr.Column(scale=2):
                    inputs = controls(gr, config, task)
                with gr.Column(scale=3):
                    made = gallery(gr, "Pictures", f"{task}_gallery", columns=2)
                    with gr.Accordion("What the model predicted at each step", open=False, elem_id=f"{task}_preview"):
                        steps = gallery(gr, "Steps of the first picture", f"{task}_steps", columns=6)
                if task == "edit" and config.edit_size == "source":
                    inputs["source"].upload(sizes, inputs["source"], inputs["size"], api_visibility="private")
                inputs["button"].click(
                    function, list(inputs["values"]), [made, steps], concurrency_id="model", api_name=task
                )
    return page


def controls(gr: Any, config: ModelConfig, task: str) -> dict[str, Any]:
    """Inputs of a tab, in the order of `Studio.run` (generate has no source), and its button."""
    multiple, largest = config.size_multiple, largest_side(config)

    def slider(name: str, label: str, value: float, low: float, high: float, step: float, **options: Any) -> Any:
        return gr.Slider(low, high, value, step=step, label=label, elem_id=f"{task}_{name}", **options)

    said = {"generate": ("Prompt", "a small wooden boat under a bridge"), "edit": ("Change", "make it snowy")}
    label, example = said[task]
    prompt = gr.Textbox(label=label, placeholder=example, lines=2, elem_id=f"{task}_prompt")
    source = []
    if task == "edit":
        box = gr.Image(
            label="Picture to edit", type="filepath", image_mode=None, sources=["upload", "clipboard"],
            height=260, elem_id="edit_source",
        )  # fmt: skip
        # As it was uploaded: Gradio would open the file first, and answer with its own traceback what it cannot read.
        box.preprocess = lambda uploaded: uploaded and uploaded.path
        source = [box]
    button = gr.Button(task.capitalize(), variant="primary", elem_id=f"{task}_button")
    with gr.Row(equal_height=True):
        seed = gr.Number(0, label="Seed of the first", precision=0, minimum=0, elem_id=f"{task}_seed")
        dice = gr.Button("Other seed", elem_id=f"{task}_dice")
    dice.click(new_seed, None, seed, queue=False, api_visibility="private")
    count = slider("count", "Pictures", 1, 1, MOST_IMAGES, 1)
    steps = slider("steps", "Steps", config.steps, 1, max(50, config.steps), 1)
    guidance = slider("guidance", "Guidance (1: none)", config.guidance_scale, 0, max(10, config.guidance_scale), 0.1)
    image_guidance = slider(
        "image_guidance", "Image guidance", config.image_guidance_scale, 0, max(5, config.image_guidance_scale), 0.1,
        visible=task == "edit",
    )  # fmt: skip
    with gr.Row():
        width = slider("width", "Width", config.native_size, multiple, largest, multiple)
        height = slider("height", "Height", config.native_size, multiple, largest, multiple)
    return {
        "values": [prompt, *source, width, height, steps, guidance, image_guidance, seed, count],
        "button": button,
        "source": source[0] if source else None,
        "size": [width, height],
    }


@contextlib.contextmanager
def complaints(gr: Any) -> Iterator[None]:
    """Bad input is said on the page."""
    try:
        yield
    except UserError as error:
        message = html.escape(str(error))  # shown as HTML, and it may quote the prompt
        raise gr.Error(message, title="Please change", duration=None, print_exception=False) from None


def largest_side(config: ModelConfig) -> int:
    """Of a picture on the page, in pixels."""
    return max(config.size_multiple, 2 * config.native_size // config.size_multiple * config.size_multiple)


def source_size(config: ModelConfig, path: str) -> tuple[int, int]:
    """(width, height) of an edit of a picture: its own, as far as the page and the network go."""
    size = pictures.read_picture(path, lambda note: None, name=Path(path).name).size  # notes are made by the edit
    shrink = min(1.0, largest_side(config) / max(size))
    return image_size(config, None, None, tuple(max(config.size_multiple, int(shrink * side)) for side in size))


def new_seed() -> int:
    return random.randrange(2**31)


def gallery(gr: Any, label: str, name: str, columns: int) -> Any:
    return gr.Gallery(
        label=label, elem_id=name, columns=columns, fit_columns=False, object_fit="contain", height="auto",
        interactive=False, buttons=["download"],
    )  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(sys.argv[1:] if argv is None else argv)
    if not 0 < args.port < 2**16:
        raise UserError(f"--port is {args.port}; it must be from 1 to {2**16 - 1}")
    if importlib.util.find_spec("gradio") is None:
        raise UserError("the page needs gradio, which is not installed; pip install 'dreamlite_jax[app]'")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    with temporary_folder() as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(folder / "gradio")  # read when Gradio is imported
        (folder / "made").mkdir()
        serve(args, folder)
    return 0


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """A folder for what is uploaded and drawn, gone at the end: of SIGTERM and a closed terminal as of Ctrl-C."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # which Python lets nobody else handle
    # What is ignored stays so: nohup asks for it.
    before = {n: signal.signal(n, stop) for n in numbers if signal.getsignal(n) != signal.SIG_IGN}
    if within := os.environ.get("GRADIO_TEMP_DIR"):
        Path(within).mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="dreamlite_", dir=within))
    # Once more when the threads have ended: one may be writing a picture just now.
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        yield folder
    finally:
        for number in before:  # no second Ctrl-C in the middle of it
            signal.signal(number, signal.SIG_IGN)
        shutil.rmtree(folder, ignore_errors=True)
        for number, handler in before.items():
            signal.signal(number, handler)


def serve(args: argparse.Namespace, folder: Path) -> None:
    """Serves the page until it is interrupted."""
    from dreamlite_jax import load_model
    from dreamlite_jax.text.words import UnreadWords

    model = load_model(args.model)
    warnings.simplefilter("ignore", UnreadWords)  # the page says it
    import gradio as gr

    studio = Studio(model, args.model.name or str(args.model), folder / "made")
    page = build(studio)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # fetches no fonts
    try:
        page.launch(
            server_name=args.host, server_port=args.port, share=False, inbrowser=False, show_error=True,
            allowed_paths=[str(studio.folder)], theme=theme, css=CSS + SMALL_CSS * (model.config.native_size < SMALL),
            max_file_size=MOST_BYTES,
        )  # fmt: skip
    except OSError as error:
        raise UserError(f"--port {args.port} cannot be served on {args.host}: {error}") from error
    finally:
        page.close(verbose=False)


if __name__ == "__main__":
    cli.run(main)
