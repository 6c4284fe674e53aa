"""What a conversion is given: a folder, a file, or the name of a repository on the hub."""

import re
from pathlib import Path
from typing import Literal

from dreamlite_jax.errors import UserError
from dreamlite_jax.json_files import read_json
from dreamlite_jax.model_folder import LORA_FILES
from dreamlite_jax.tensor_files import stored_tensors

from .torch_files import refuse_lora, refuse_pickles

Kind = Literal["pipeline", "unet", "vae", "taesd", "text_encoder"]
KINDS = (
    "a diffusers folder of a pipeline, a U-Net or an AutoencoderTiny, a Qwen3-VL text encoder, "
    "or the two files of the original TAESD (…encoder.safetensors, …decoder.safetensors)"
)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?")
# Repositories whose diffusers layout is on a branch of its own.
REVISIONS = {"carlofkl/DreamLite-base": "diffusers", "carlofkl/DreamLite-mobile": "diffusers"}
HUB_FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja")


def locate(source: str) -> Path:
    """The local path of a source; a hub id `owner/name[@revision]` is downloaded.

    Raises:
      UserError: no such path, and no hub id, or the download failed (network, access, name).
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not HUB_ID.fullmatch(source):
        raise UserError(f"--source {source} does not exist, and is no hub id (owner/name or owner/name@revision)")
    repository, _, revision = source.partition("@")
    return download(repository, revision or REVISIONS.get(repository))


def download(repository: str, revision: str | None) -> Path:
    """A snapshot of a hub repository. Raises `UserError` with the remedy when it cannot be had."""
    import huggingface_hub
    from huggingface_hub import errors

    name = f"{repository}@{revision}" if revision else repository
    # The HTTP library under the hub's differs by version; the base of its errors is a base of the hub's own.
    transport_error = errors.HfHubHTTPError.__mro__[1]
    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=list(HUB_FILES)))
    except errors.GatedRepoError:
        raise UserError(
            f"--source {name}: access is restricted; accept the licence at huggingface.co/{repository}, "
            "then `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise UserError(f"--source {name}: the repository has no such revision") from None
    except errors.RepositoryNotFoundError:
        raise UserError(
            f"--source {name}: no such folder here and no such repository on the hub, or no access"
        ) from None
    except errors.HFValidationError as error:
        raise UserError(f"--source {name}: no such folder here, and no valid hub id: {error}") from None
    except (errors.XetDownloadError, transport_error, OSError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--source {name}: no such folder here, and the hub cannot be reached ({reason}); "
            "check the network, or give a local folder"
        ) from None


def classify(path: Path) -> Kind:
    """What lies at a path. Raises `UserError` that says what it is instead, as far as that can be told."""
    if path.is_file():
        return _classify_file(path)
    if (path / "model_index.json").is_file():
        return "pipeline"
    if any((path / name).is_file() for name in LORA_FILES):
        raise UserError(
            f"{path} is a LoRA, not a model; convert the model it was trained on, and apply the LoRA to that"
        )
    if (path / "scheduler_config.json").is_file() or (path / "tokenizer_config.json").is_file():
        raise UserError(f"{path} has no weights and needs no conversion by itself; give the pipeline folder above it")
    if (path / "config.json").is_file():
        config = read_json(path / "config.json")
        name = config.get("_class_name")
        if name == "AutoencoderTiny":
            return "vae"
        if config.get("model_type") == "qwen3_vl":
            return "text_encoder"
        if name is not None and "UNet" in name:
            return "unet"  # another U-Net than ours is refused, by name, when its config is read
        what = name or config.get("model_type") or "no _class_name and no model_type"
        raise UserError(f"{path / 'config.json'} says {what}; the source must be {KINDS}")
    if taesd_files(path):
        return "taesd"
    if (path / "model.json").is_file():
        raise UserError(f"{path} is a model folder already; conversion.to_torch makes a diffusers folder of it")
    refuse_pickles(path)
    lacking = " (a pipeline folder without model_index.json)" if (path / "unet").is_dir() else ""
    raise UserError(f"{path} has no config.json and no model_index.json{lacking}; the source must be {KINDS}")


def taesd_files(path: Path) -> tuple[Path, Path] | None:
    """Encoder and decoder file of an original TAESD, from their folder or from one of them."""
    folder = path if path.is_dir() else path.parent
    pairs = [
        (encoder, folder / encoder.name.replace("encoder", "decoder"))
        for encoder in sorted(folder.glob("*encoder*.safetensors"))
    ]
    if path.is_file():
        pairs = [pair for pair in pairs if path in pair]
    whole = [pair for pair in pairs if pair[1].is_file()]
    if len(whole) > 1:
        names = ", ".join(encoder.name for encoder, _ in whole)
        raise UserError(f"{folder} has more than one autoencoder ({names}); give one of the files as the source")
    return whole[0] if whole else None


def _classify_file(path: Path) -> Kind:
    """A lone file: one of TAESD's two, or something that is refused with its name."""
    if path.suffix != ".safetensors":
        raise UserError(f"{path} is a file of type {path.suffix or 'none'}; a file must be .safetensors, {KINDS} else")
    tensors = stored_tensors(path)
    refuse_lora(path, tensors)
    if tensors and all(name.split(".")[0].isdigit() for name in tensors):
        if taesd_files(path) is None:
            raise UserError(
                f"{path} is one half of a TAESD; the other (encoder and decoder in its name) must be beside it"
            )
        return "taesd"
    if any(name.startswith("model.diffusion_model.") for name in tensors):
        raise UserError(
            f"{path} is a single-file Stable Diffusion checkpoint, not DreamLite; the source must be {KINDS}"
        )
    if any(name.startswith("down_blocks.") for name in tensors):
        kind = "an SDXL U-Net" if any(".add_embedding" in f".{n}" for n in tensors) else "a U-Net"
        if "encoder_hid_proj.0.weight" in tensors:
            kind = "a DreamLite U-Net"
        raise UserError(f"{path} looks like {kind} without its config; give the folder that has config.json beside it")
    raise UserError(
        f"{path} holds no model known here (first tensor {next(iter(tensors), 'none')}); it must be {KINDS}"
    )
