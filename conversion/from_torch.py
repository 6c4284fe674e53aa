"""Makes a model folder of released weights: python -m conversion.from_torch --source DIFFUSERS_DIR --output DIR.

SOURCE is a DreamLite folder of diffusers (base or mobile; weights in one safetensors file or in shards, fp32, fp16 or
bf16; either generation of block names), a hub id (owner/name[@revision]), or one component:

  a U-Net           model folder without an autoencoder, unless --vae names one
  an autoencoder    OUTPUT/vae.safetensors, which configs take; diffusers' AutoencoderTiny or the original TAESD's files
  a text encoder    OUTPUT/text_encoder, checked and carried as it is

Tensors keep their dtype. Text encoder, tokenizer and processor are carried as they are. OUTPUT/report.json lists every
tensor with its two names, its dtype and its shape; a missing, extra or misshapen one is an error.
"""

import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamlite_jax import cli, model_folder, released
from dreamlite_jax.config import ModelConfig, UNetConfig, VAEConfig
from dreamlite_jax.errors import UserError
from dreamlite_jax.json_files import read_json
from dreamlite_jax.tensor_files import Shape, check_tensors, open_tensors, write_streamed

from . import diffusers_config, names, outputs, resources, sources, torch_files
from .names import TorchTensor
from .torch_files import Tensors

NO_TEXT = "prompts cannot be encoded without it"
NO_VAE = "images cannot be encoded or decoded without it; --vae names one"


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.documented("conversion.from_torch", __doc__)
    parser.add_argument("--source", required=True, help="folder, file or hub id")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; it must not be in use")
    parser.add_argument("--vae", help="autoencoder for a SOURCE that is a U-Net alone: folder, file or hub id")
    args = parser.parse_args(argv)
    print(torch_files.summary(convert(args.source, args.output, args.vae)))
    return 0


def convert(source: str, output: str | Path, vae: str | None = None) -> dict[str, Any]:
    """Converts `source` into folder `output` and returns its report.

    Raises:
      UserError: the source cannot be had, is of another kind or damaged, or a tensor does not fit the architecture.
    """
    start = time.monotonic()
    with outputs.new_folder(Path(output)) as folder:  # first, as locating a source may download it
        path = sources.locate(source)
        kind = sources.classify(path)
        if vae is not None and kind != "unet":
            raise UserError(f"--vae goes with a --source that is a U-Net alone; {path} is a {kind}")
        report = torch_files.new_report("from_torch", path, {"source": source, "output": output, "vae": vae})
        report["kind"] = kind
        if kind == "pipeline":
            _pipeline(path, folder, report)
        elif kind == "unet":
            _unet_alone(path, vae, folder, report)
        elif kind == "text_encoder":
            check_text_encoder(path, None)
            resources.check_disk(resources.bytes_of([path]), folder)
            _carry(path, folder / "text_encoder", report)
        else:
            _write_vae(folder, *read_vae(path, kind), report)
        report["seconds"] = time.monotonic() - start
        torch_files.write_report(folder, report)
    return report


# --- kinds of sources


def _pipeline(path: Path, folder: Path, report: dict[str, Any]) -> None:
    config = released.load_config(path)
    if (path / "text_encoder").is_dir():
        check_text_encoder(path / "text_encoder", config.unet.text_dim)
    files = [file for part in model_folder.COMPONENTS for file in torch_files.weight_files(path / part)]
    carried = [path / part for part in torch_files.TEXT_PARTS]
    resources.check_disk(resources.bytes_of([*files, *carried]), folder)
    for component in model_folder.COMPONENTS:
        tensors = open_component(path / component, component, getattr(config, component))
        _write_component(folder, component, tensors, report)
    for part in torch_files.TEXT_PARTS:
        if (path / part).is_dir():
            _carry(path / part, folder / part, report)
        else:
            report["absent"][part] = NO_TEXT
    index = read_json(path / released.PIPELINE)
    model_folder.write_manifest(folder, config, {**_provenance(report), "pipeline": index})


def _unet_alone(path: Path, vae: str | None, folder: Path, report: dict[str, Any]) -> None:
    file, index = path / "config.json", path.parent / released.PIPELINE  # of the whole folder it may be taken from
    raw = read_json(file)
    unet = diffusers_config.unet_from_diffusers(raw, str(file))
    resources.check_disk(resources.bytes_of(torch_files.weight_files(path)), folder)
    _write_component(folder, "unet", open_component(path, "unet", unet), report)
    autoencoder = VAEConfig(latent_channels=unet.out_channels)
    if vae is None:
        report["absent"]["vae"] = NO_VAE
    else:
        autoencoder_path = sources.locate(vae)
        kind = sources.classify(autoencoder_path)
        if kind not in ("vae", "taesd"):
            raise UserError(f"--vae {vae} is a {kind}; it must be an AutoencoderTiny or an original TAESD")
        autoencoder, tensors = read_vae(autoencoder_path, kind)
        if autoencoder.latent_channels != unet.out_channels:
            raise UserError(
                f"--vae {vae} has {autoencoder.latent_channels} latent channels; the U-Net has {unet.out_channels}"
            )
        _write_component(folder, "vae", tensors, report)
    config = ModelConfig(
        unet=unet,
        vae=autoencoder,
        text=released.text_config(read_json(index) if index.is_file() else {}, str(index)),
        native_size=(raw.get("sample_size") or released.DEFAULT_LATENT_SIZE) * autoencoder.downsampling,
        edit_size="source",
    )
    report["absent"] |= dict.fromkeys(torch_files.TEXT_PARTS, NO_TEXT)
    model_folder.write_manifest(folder, config, _provenance(report))


def read_vae(path: Path, kind: str) -> tuple[VAEConfig, Tensors]:
    """Config and parameters of an autoencoder in either format."""
    if kind == "taesd":
        return open_taesd(path)
    config = diffusers_config.vae_from_diffusers(read_json(path / "config.json"), str(path / "config.json"))
    return config, open_component(path, "vae", config)


def open_component(path: Path, component: model_folder.Component, config: UNetConfig | VAEConfig) -> Tensors:
    """The tensors of a diffusers component folder, strictly those of `config`, in our layout and their own dtype."""
    shapes = model_folder.expected_shapes(component, config)
    return _opened(path, names.TABLES[component].tensors(shapes), shapes, torch_files.weight_files(path))


def open_taesd(path: Path) -> tuple[VAEConfig, Tensors]:
    """An original TAESD: two files of numbered layers, from whose shapes the architecture is read."""
    files = dict(zip(("encoder", "decoder"), sources.taesd_files(path), strict=True))
    config = taesd_config(*(torch_files.checkpoint([file]) for file in files.values()), str(path))
    shapes = model_folder.expected_shapes("vae", config)
    halves = {}
    for half, table in (("encoder", names.TAESD_ENCODER), ("decoder", names.TAESD_DECODER)):
        wanted = table.tensors({path: shape for path, shape in shapes.items() if path.startswith(f"{half}/")})
        halves[half] = _opened(files[half], wanted, shapes, [files[half]])
    # In the report both halves stand together: their names are told apart as diffusers' are.
    torch = {
        path: TorchTensor(f"{half}:{tensor.name}", tensor.shape)
        for half, tensors in halves.items()
        for path, tensor in tensors.torch.items()
    }
    kinds = halves["encoder"].kinds | halves["decoder"].kinds
    return config, Tensors(torch, kinds, lambda path: halves[path.partition("/")[0]].read(path))


def _opened(where: Path, wanted: Mapping[str, TorchTensor], shapes: Mapping[str, Shape], files: list[Path]) -> Tensors:
    """Torch files, checked to hold exactly the `wanted` tensors."""
    found = torch_files.checkpoint(files)
    expected = {tensor.name: tensor.shape for tensor in wanted.values()}
    check_tensors(str(where), expected, {name: stored for name, (_, stored) in found.items()})
    return torch_files.open_checkpoint(found, wanted, shapes)


def taesd_config(encoder: torch_files.Checkpoint, decoder: torch_files.Checkpoint, where: str) -> VAEConfig:
    """Width, latent channels and blocks a level of an original TAESD."""
    inputs = encoder.get("0.weight")
    if inputs is None or len(inputs[1].shape) != 4:
        raise UserError(f"{where} is no TAESD: its encoder has no convolution 0.weight")
    last = encoder[f"{max(int(name.split('.')[0]) for name in encoder)}.bias"]
    return VAEConfig(
        latent_channels=last[1].shape[0],
        width=inputs[1].shape[0],
        encoder_blocks=_blocks_a_level(encoder)[:-1],  # the last convolution begins no level
        decoder_blocks=_blocks_a_level(decoder)[:-1],
    )


def _blocks_a_level(tensors: torch_files.Checkpoint) -> tuple[int, ...]:
    """Residual blocks after each plain convolution, in order."""
    layers: dict[int, bool] = {}
    for name in tensors:
        index, rest = name.split(".", 1)
        layers[int(index)] = rest.startswith("conv.")
    counts: list[int] = []
    for _, is_block in sorted(layers.items()):
        if is_block and counts:
            counts[-1] += 1
        else:
            counts.append(0)
    return tuple(counts)


def check_text_encoder(path: Path, text_dim: int | None) -> None:
    """Raises `UserError` unless a folder has exactly the tensors of its Qwen3-VL, of the U-Net's width and finite."""
    from dreamlite_jax.models.qwen_vl import load
    from dreamlite_jax.models.qwen_vl.model import QwenVL, abstract_params

    config = load.read_config(path)
    width = config.text.hidden_size
    if text_dim is not None and width != text_dim:
        raise UserError(f"{path}: hidden_size is {width}, but the U-Net takes text states of width {text_dim}")
    slots = load.expected_tensors(abstract_params(QwenVL(config)), config)
    places = load.stored_tensors(path)
    load.check_tensors(path, slots, places)
    for file in sorted({place.file for place in places.values()}):
        with open_tensors(file) as opened:
            for name in opened.keys():  # noqa: SIM118  (not a mapping)
                opened.get_tensor(name)  # refuses what is not finite


# --- writing


def _write_component(folder: Path, component: model_folder.Component, tensors: Tensors, report: dict[str, Any]) -> None:
    write_streamed(folder / model_folder.weight_file(component), tensors.kinds, tensors.read)
    report["components"][component] = torch_files.component_report(tensors)


def _write_vae(folder: Path, config: VAEConfig, tensors: Tensors, report: dict[str, Any]) -> None:
    """A single autoencoder, in the form of `model_folder.save_vae`: its config is in the file."""
    tree = model_folder.unflatten({path: tensors.read(path) for path in tensors.kinds})
    model_folder.save_vae(folder / model_folder.weight_file("vae"), config, tree, _provenance(report), dtype=None)
    report["components"]["vae"] = torch_files.component_report(tensors)


def _carry(source: Path, target: Path, report: dict[str, Any]) -> None:
    shutil.copytree(source, target)
    report["carried"].append(target.name)


def _provenance(report: Mapping[str, Any]) -> dict[str, Any]:
    return {key: report[key] for key in ("command", "flags", "source")} | {"versions": torch_files.versions()}


if __name__ == "__main__":
    cli.run(main)
