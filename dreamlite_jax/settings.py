"""What made a picture: the settings that every command and the page write into it. No JAX here."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamlite_jax.config import ModelConfig
from dreamlite_jax.errors import UserError

KEY = "dreamlite_jax"  # of the PNG's text
CHOSEN = ("steps", "guidance_scale", "image_guidance_scale")


def of_picture(
    config: ModelConfig,
    prompt: str,
    image: str | Path | None,
    chosen: Mapping[str, Any],
    size: tuple[int, int],
    model: str,
    *,
    shown: str | None = None,
) -> dict[str, Any]:
    """Task, prompt, source, the numbers chosen and the model, defaults resolved; `seed` is each picture's own.

    Args:
      image: file of an edit's source.
      chosen: holds those of `CHOSEN`; None: the model's own.
      size: (width, height) in pixels.
      shown: what the source is called; default: its path as given.
    """
    given = {name: chosen[name] if chosen[name] is not None else getattr(config, name) for name in CHOSEN}
    source = (None, None)
    if image is not None:
        source = shown or str(image), hashlib.sha256(Path(image).read_bytes()).hexdigest()
    return {
        "task": "generate" if image is None else "edit",
        "prompt": prompt,
        "image": source[0],
        "image_sha256": source[1],
        **given,
        "width": size[0],
        "height": size[1],
        "model": model,
    }


def as_text(settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings as a PNG carries them."""
    return {KEY: json.dumps(settings)}


def check_source_stays(image: Path | None, outputs: Sequence[Path]) -> None:
    """Raises `UserError` where a picture would be written over its source, under whatever name."""
    for output in outputs if image is not None else ():
        if output.exists() and image.exists() and output.samefile(image):
            raise UserError(f"--output {output} is the picture that --image {image} names; choose another file")
