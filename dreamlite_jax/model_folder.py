"""The self-describing folder every command takes: `model.json` beside `unet.safetensors` and `vae.safetensors`.

`model.json` holds the format version, the whole `ModelConfig` and the provenance (where the weights come from). Weight
files hold one tensor a leaf of the flax parameter tree, named by its path joined with "/", in flax layout; where it is
int8, its scales are beside it as NAME:scale (`dreamlite_jax.int8`). A folder appears complete or not at all. A tiny
autoencoder alone is one file that carries its config in its metadata.
"""

import contextlib
import ctypes
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from dreamlite_jax.config import ModelConfig, UNetConfig, VAEConfig, from_dict, to_dict, with_text_state
from dreamlite_jax.errors import UserError
from dreamlite_jax.int8 import open_weights, pack, stored_weights
from dreamlite_jax.models.unet import UNet, dummy_inputs
from dreamlite_jax.models.vae import VAE
from dreamlite_jax.tensor_files import (
    Shape,
    Stored,
    check_finite,
    check_tensors,
    read_metadata,
    write_tensors,
)

FORMAT_VERSION = 1
LORA_FILES = ("adapter_config.json", "pytorch_lora_weights.safetensors")  # of a low-rank adapter's folder
MANIFEST = "model.json"
FROM_TORCH = "conversion.from_torch"  # the command in the provenance of released weights
CHECKPOINTS = "checkpoints"  # in the workdir of a training run, a folder each step
Component = Literal["unet", "vae"]
COMPONENTS: tuple[Component, ...] = ("unet", "vae")
Tree = Mapping[str, Any]  # nested parameters of one module, without the "params" level


def save_model(
    directory: str | Path,
    config: ModelConfig,
    params: Mapping[str, Tree],
    provenance: Mapping[str, Any],
    *,
    replace: bool = False,
    dtype: Any = np.float32,
    folders: Mapping[str, Path] | None = None,
) -> Path:
    """Writes a model folder and returns its path.

    Args:
      params: {"unet": tree, "vae": tree}; arrays of numpy or JAX.
      provenance: anything JSON can hold: commands, versions, sources of the weights.
      replace: whether an existing folder with files in it gives way to the new one, in one step at the end.
      dtype: of the stored tensors; None keeps each one's own, int8 packs kernels (`dreamlite_jax.int8`).
      folders: more folders to copy in, by the name they get (text_encoder, tokenizer …).

    Raises:
      UserError: the folder exists and is not empty (without `replace`), or parameters do not fit the config or are not
        finite, in `dtype`.
    """
    with new_folder(directory, replace=replace) as folder:
        for component in COMPONENTS:
            if component not in params:
                raise UserError(f"params has no {component!r}; it must have {' and '.join(map(repr, COMPONENTS))}")
            packed = dtype is not None and np.dtype(dtype) == np.int8
            tensors = flatten(params[component], np.float32 if packed else dtype)
            check_fit(f"params[{component!r}]", expected_shapes(component, getattr(config, component)), tensors)
            write_tensors(folder / weight_file(component), pack(tensors) if packed else tensors)
        for name, source in (folders or {}).items():
            shutil.copytree(source, folder / name)
        write_manifest(folder, config, provenance)
    return Path(directory)


def find_model(location: str | Path) -> Path:
    """The model folder at `location`, or the one that a training run exported into that workdir."""
    path = Path(location)
    return path / "model" if (path / "model" / MANIFEST).is_file() else path


def load_config(directory: str | Path) -> ModelConfig:
    """The architecture and sampling settings of a model folder. Raises `UserError` when it is not one."""
    path, manifest = Path(directory) / MANIFEST, read_manifest(directory)
    # Of a folder made before `text.state` was stored: released weights read one state, all trained here the other.
    state = "before_norm" if manifest["provenance"].get("command") == FROM_TORCH else "after_norm"
    return from_dict(ModelConfig, with_text_state(manifest["config"], state), f"{path}: config")


def load_provenance(directory: str | Path) -> dict[str, Any]:
    """Where a model folder's weights come from, as `save_model` was told."""
    return dict(read_manifest(directory)["provenance"])


def load_params(directory: str | Path, component: Component, *, dtype: Any = np.float32) -> dict[str, Any]:
    """Parameters of the U-Net or the VAE as a nested dict of numpy arrays, strictly as the folder's config says.

    Args:
      dtype: what every tensor becomes; None keeps it as it is stored (float32 where it is packed).

    Raises:
      UserError: a missing, extra or misshapen tensor (with its nearest match), or one with a value that is no finite
        number; a truncated file, no model folder.
    """
    if component not in COMPONENTS:
        raise UserError(f"component is {component!r}; a model folder has {' and '.join(map(repr, COMPONENTS))}")
    config, path = getattr(load_config(directory), component), Path(directory) / weight_file(component)
    if not path.is_file():
        raise UserError(f"model folder {directory} lacks {path.name}")
    return read_params(path, expected_shapes(component, config), dtype)


def save_vae(
    path: str | Path, config: VAEConfig, params: Tree, provenance: Mapping[str, Any], *, dtype: Any = np.float32
) -> Path:
    """Writes an autoencoder as a file with its config and provenance in the metadata; bfloat16 or float16 halve it."""
    tensors = flatten(params, dtype)
    check_fit("params", expected_shapes("vae", config), tensors)
    manifest = {"format_version": FORMAT_VERSION, "config": to_dict(config), "provenance": dict(provenance)}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_tensors(Path(path), tensors, {"dreamlite_vae": json.dumps(manifest, sort_keys=True)})
    return Path(path)


def load_vae(path: str | Path, *, dtype: Any = np.float32) -> tuple[VAEConfig, dict[str, Any]]:
    """Config and parameters of a file that `save_vae` wrote, or of a model folder's own `vae.safetensors`.

    Raises:
      UserError: the file is neither, or is damaged.
    """
    path, config = Path(path), vae_config(path)
    if _in_model_folder(path):
        return config, load_params(path.parent, "vae", dtype=dtype)
    return config, read_params(path, expected_shapes("vae", config), dtype)


def vae_config(path: str | Path) -> VAEConfig:
    """The config alone of what `load_vae` reads."""
    path = Path(path)
    if _in_model_folder(path):
        return load_config(path.parent).vae
    return from_dict(VAEConfig, vae_manifest(path)["config"], f"{path}: config")


def _in_model_folder(path: Path) -> bool:
    return path.name == weight_file("vae") and (path.parent / MANIFEST).is_file()


def vae_manifest(path: str | Path) -> dict[str, Any]:
    """What an autoencoder file says of itself: format_version, config, provenance."""
    metadata = read_metadata(Path(path))
    if "dreamlite_vae" not in metadata:
        raise UserError(f"{path} has no dreamlite_vae entry in its metadata; it must be a file written by save_vae")
    return check_version(json.loads(metadata["dreamlite_vae"]), str(path))


# --- parameters as named tensors


def flatten(params: Tree, dtype: Any = None) -> dict[str, np.ndarray]:
    """Leaves by path joined with "/", on the host, in `dtype` (None: their own)."""
    flat = traverse_util.flatten_dict(dict(params), sep="/")
    return {name: np.asarray(leaf, dtype) for name, leaf in flat.items()}


def unflatten(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of `flatten`."""
    return traverse_util.unflatten_dict(dict(tensors), sep="/")


@functools.lru_cache(maxsize=32)
def expected_shapes(component: Component, config: UNetConfig | VAEConfig) -> Mapping[str, Shape]:
    """Shape of every parameter of a module, by flat name; nothing is computed."""
    if component == "unet":
        module, inputs = UNet(config), dummy_inputs(config)
    else:
        side = config.downsampling
        module, inputs = VAE(config), (jnp.zeros((1, side, side, 3), jnp.float32),)
    tree = jax.eval_shape(module.init, jax.random.key(0), *inputs)["params"]
    return {name: leaf.shape for name, leaf in traverse_util.flatten_dict(tree, sep="/").items()}


def check_fit(where: str, expected: Mapping[str, Shape], tensors: Mapping[str, np.ndarray]) -> None:
    """Raises `UserError` unless tensors in memory are exactly those of the architecture, and finite."""
    check_tensors(where, expected, {name: Stored.of(array) for name, array in tensors.items()})
    for name, array in tensors.items():
        check_finite(where, name, array)


def read_params(path: Path, expected: Mapping[str, Shape], dtype: Any) -> dict[str, Any]:
    """Nested tensors of one file, checked against `expected` before any value is read."""
    check_tensors(str(path), expected, stored_weights(path))
    with open_weights(path) as file:
        tensors = {name: np.asarray(file.get_tensor(name), dtype) for name in expected}
    for name, array in tensors.items():
        if array.dtype == np.float16:  # whose range may not hold what is stored
            check_finite(f"{path} as float16", name, array)
    return unflatten(tensors)


def weight_file(component: Component) -> str:
    return f"{component}.safetensors"


# --- the manifest


def write_manifest(folder: Path, config: ModelConfig, provenance: Mapping[str, Any]) -> None:
    manifest = {"format_version": FORMAT_VERSION, "config": to_dict(config), "provenance": dict(provenance)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """`model.json` as a dict; a `UserError` says what a folder lacks to be a model folder."""
    directory = Path(directory)
    needed = (MANIFEST, *map(weight_file, COMPONENTS))
    missing = [name for name in needed if not (directory / name).is_file()]
    if not directory.is_dir():
        hint = ""
        if not directory.is_absolute() and len(directory.parts) == 2:
            hint = f"; if it is a repository on the hub: python -m conversion.from_torch --source {directory}"
        raise UserError(f"model folder {directory} does not exist{hint}")
    if any((directory / name).is_file() for name in LORA_FILES):
        raise UserError(f"{directory} is a LoRA, not a model; give the model it was trained on")
    if MANIFEST in missing or len(missing) == len(COMPONENTS):  # one component alone is allowed, until it is loaded
        hint = ""
        if (directory / "model_index.json").is_file() or (directory / "unet" / "config.json").is_file():
            hint = "; it is a diffusers folder: python -m conversion.from_torch makes a model folder of it"
        if (directory / CHECKPOINTS).is_dir():
            raise UserError(f"{directory} is a training run that has not exported a model yet, {_state_of(directory)}")
        raise UserError(f"{directory} is not a model folder: it lacks {', '.join(missing)}{hint}")
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    return check_version(manifest, str(path))


def _state_of(workdir: Path) -> str:
    """What a run has instead of a model, and how it comes by one."""
    steps = sorted(int(path.name) for path in (workdir / CHECKPOINTS).iterdir() if path.name.isdigit())
    numbers = ", ".join(map(str, steps))
    found = f"checkpoints of step{'s' * (len(steps) > 1)} {numbers}" if steps else "no checkpoint"
    return (
        f"with {found}: the command that trains it goes on from there and exports at its last step, "
        "--config.steps=N earlier"
    )


def check_version(manifest: Any, where: str) -> dict[str, Any]:
    """The manifest, if it is one that this version of the code can read."""
    keys = {"format_version", "config", "provenance"}
    if not isinstance(manifest, dict) or set(manifest) != keys or not isinstance(manifest["provenance"], dict):
        raise UserError(f"{where} is not a manifest of a model: it must hold {', '.join(sorted(keys))}")
    if manifest["format_version"] != FORMAT_VERSION:
        raise UserError(f"{where}: format_version is {manifest['format_version']!r}; this code reads {FORMAT_VERSION}")
    return manifest


# --- folders that appear complete or not at all


@contextlib.contextmanager
def new_folder(directory: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary sibling to fill; at the end it takes the name `directory`, after a failure it is removed.

    Raises:
      UserError: `directory` is a file, or a folder with something in it and `replace` is off.
    """
    directory = Path(directory).absolute()
    if directory.exists() and not directory.is_dir():
        raise UserError(f"{directory} is a file; the output must be a folder")
    if directory.is_dir() and any(directory.iterdir()) and not replace:
        raise UserError(f"{directory} exists and is not empty; choose another folder or ask to replace it")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".part", dir=directory.parent))
    try:
        os.chmod(temporary, 0o777 & ~_umask())  # mkdtemp's folder is private
        yield temporary
        _take_place(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _take_place(new: Path, old: Path) -> None:
    """`new` gets the name of `old`; afterwards the former content, if there was any, is at `new`."""
    if not old.exists():
        os.rename(new, old)
    elif not _exchange(new, old):
        aside = new.with_suffix(".old")
        os.rename(old, aside)
        try:
            os.rename(new, old)
        except OSError:
            os.rename(aside, old)
            raise
        os.rename(aside, new)


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two folders in one step where the system can (Linux's renameat2), so that no moment is without a model."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    current_folder, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(current_folder, os.fsencode(a), current_folder, os.fsencode(b), exchange) == 0


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
