"""Computes a prompt's text states: python -m conversion.states --model DIR --prompt TEXT --litert DIR --output FILE.npz

For LiteRT folders without a text encoder, or whose encoder cannot see the picture of an edit (--image): the JAX encoder
of the model gives the states of the prompt, and of the null prompt that guidance needs, at the length that the folder's
U-Net takes. `conversion.runtime --states FILE` draws with them, without JAX.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dreamlite_jax import cli, pictures
from dreamlite_jax.errors import UserError
from dreamlite_jax.model_folder import find_model
from dreamlite_jax.text.encoder import PromptEncoder, PromptRequest

from . import outputs
from .runtime import read_manifest


def compute(encoder: PromptEncoder, request: PromptRequest, length: int) -> dict[str, np.ndarray]:
    """What `runtime.STATES` lists: states (1, length, d) and masks (1, length) of a prompt and of its null prompt.

    The command adds which `state` of the text encoder they are (`TextConfig`), "" where it has no choice.

    Raises:
      UserError: the prompt has more states than `length`.
    """
    null = PromptRequest("null", "", request.image)  # an encoder that sees pictures is given the source here too
    try:
        states, mask = encoder.encode([request, null], length)
    except UserError as error:
        raise UserError(f"{error} (the files were converted with --text_length {length})") from None
    found = {"task": np.array(request.task), "prompt": np.array(request.text)}
    for i, part in enumerate(("prompt", "null")):
        found |= {f"{part}_states": states[i : i + 1], f"{part}_mask": mask[i : i + 1]}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.documented("conversion.states", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="model folder, or the workdir of a training run")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--image", type=Path, help="picture to edit")
    parser.add_argument("--litert", type=Path, required=True, help="folder that the states are for")
    parser.add_argument("--output", type=Path, required=True, help=".npz to write")
    args = parser.parse_args(sys.argv[1:] if argv is None else argv)
    if args.output.suffix != ".npz":
        raise UserError(f"--output {args.output} must end in .npz")
    outputs.check_file(args.output)
    image = pictures.read_picture(args.image) if args.image else None
    request = PromptRequest("generate" if image is None else "edit", args.prompt, image)
    manifest = read_manifest(args.litert)
    from dreamlite_jax.model import load_config
    from dreamlite_jax.text.load import load_encoder, unread

    text, length = load_config(args.model).text, manifest["sizes"]["text_length"]
    if text.state != (wanted := manifest["config"]["text"].get("state")):
        raise UserError(
            f"--model {args.model} reads text states {text.state}, but --litert {args.litert} those {wanted}; give the "
            "model that it was converted from"
        )
    if said := unread(text, request.text):
        print(said, file=sys.stderr)
    found = compute(load_encoder(text, find_model(args.model)), request, length)
    found["state"] = np.array(text.state or "")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.output.with_name(f".{args.output.name}.{os.getpid()}.part.npz")
    try:
        np.savez(temporary, **found)
        os.replace(temporary, args.output)
    finally:
        temporary.unlink(missing_ok=True)
    counts = " and ".join(f"{int(found[f'{part}_mask'].sum())} of the {part}" for part in ("prompt", "null"))
    print(f"{args.output}: {counts}, padded to {length} states")
    return 0


if __name__ == "__main__":
    cli.run(main)
