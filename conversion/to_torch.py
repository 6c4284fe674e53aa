"""Makes a diffusers folder of a model folder: python -m conversion.to_torch --model DIR --output DIFFUSERS_DIR.

`DreamLitePipeline.from_pretrained` and `DreamLiteMobilePipeline.from_pretrained` load it as it is when the model's text
encoder is Qwen3-VL. A model with another one has no text encoder there: pass text_encoder=None, tokenizer=None and
processor=None. Tensors keep their dtype (those of one byte become float32); OUTPUT/report.json lists each with its
two names, dtype and shape.

The pipelines read `hidden_states[-1]` of Qwen3-VL, which transformers 4.57.3 makes before the model's final norm and
transformers 5 after it. The command prints which of the two the network was trained on, and so what its users must pin:
before the norm transformers==4.57.3, whose huggingface_hub diffusers takes up to 0.39.0.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamlite_jax import cli, model_folder, released
from dreamlite_jax.config import ModelConfig, TextState
from dreamlite_jax.errors import UserError
from dreamlite_jax.int8 import open_weights, stored_weights
from dreamlite_jax.tensor_files import DTYPES, Stored, check_tensors, write_streamed

from . import diffusers_config, names, outputs, resources, torch_files
from .torch_files import Tensors

PARTS = {  # classes of a pipeline's parts, where a converted folder does not say otherwise
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "unet": ("diffusers", "DreamLiteUNetModel"),
    "vae": ("diffusers", "AutoencoderTiny"),
    "text_encoder": ("transformers", "Qwen3VLForConditionalGeneration"),
    "tokenizer": ("transformers", "Qwen2Tokenizer"),
    "processor": ("transformers", "Qwen3VLProcessor"),
}

PINS: dict[TextState, str] = {
    "before_norm": "this network reads Qwen3-VL's states before the final norm: its users must pin "
    "transformers==4.57.3, as DreamLite does, and with it diffusers==0.39.0; with transformers 5 diffusers reads the "
    "states after the norm, without a word, unless their code puts the last decoder layer's output into "
    "hidden_states[-1]",
    "after_norm": "this network reads Qwen3-VL's states after the final norm: its users must pin transformers>=5; with "
    "4.57.3 diffusers reads those before the norm, without a word",
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.documented("conversion.to_torch", __doc__)
    parser.add_argument("--model", type=Path, required=True, help="model folder, or the workdir of a training run")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; it must not be in use")
    args = parser.parse_args(argv)
    print(torch_files.summary(convert(args.model, args.output)))
    return 0


def convert(model: str | Path, output: str | Path) -> dict[str, Any]:
    """Converts a model folder into diffusers folder `output` and returns its report.

    Raises:
      UserError: no model folder, a damaged one, or an architecture that the released pipelines do not run.
    """
    start, model = time.monotonic(), model_folder.find_model(model)
    config = model_folder.load_config(model)
    if config.unet.condition_layout != "width":
        raise UserError(
            f"{model}: unet.condition_layout is {config.unet.condition_layout!r}; the released pipelines only join "
            "panels on width"
        )
    report = torch_files.new_report("to_torch", model, {"model": model, "output": output})
    parts = [model / config.text.source / part for part in torch_files.TEXT_PARTS]
    weights = [model / model_folder.weight_file(component) for component in model_folder.COMPONENTS]
    kinds = [kind for file in weights if file.is_file() for kind in stored_weights(file).values()]
    whole = sum(kind.bytes for kind in kinds if kind.dtype in DTYPES)  # what is of another kind is refused below
    resources.check_disk(whole + resources.bytes_of(parts), Path(output))
    with outputs.new_folder(Path(output)) as folder:
        for component in model_folder.COMPONENTS:
            if (model / model_folder.weight_file(component)).is_file():
                _write_component(model, component, config, folder, report)
            else:
                report["absent"][component] = "the model folder has none"
        _write_json(
            folder / "scheduler" / "scheduler_config.json", diffusers_config.scheduler_to_diffusers(config.scheduler)
        )
        _carry_text(model, config, folder, report)
        if config.text.state is not None:
            report["notes"] = [PINS[config.text.state]]
        _write_json(folder / "model_index.json", model_index(config, model_folder.load_provenance(model), folder))
        report["seconds"] = time.monotonic() - start
        torch_files.write_report(folder, report)
    return report


def pipeline_class(config: ModelConfig) -> str:
    """The distilled model is the one sampled without guidance."""
    guided = config.guidance_scale != 1.0 or config.image_guidance_scale != 1.0
    return "DreamLitePipeline" if guided else "DreamLiteMobilePipeline"


def model_index(config: ModelConfig, provenance: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """model_index.json: the class of each part in `folder`, as the pipeline the model came from had it."""
    former = provenance.get("pipeline", {})
    index: dict[str, Any] = {
        "_class_name": pipeline_class(config),
        "_diffusers_version": diffusers_config.DIFFUSERS_VERSION,
    }
    if config.text.state is not None:
        index[released.TEXT_STATE] = config.text.state
    for part, usual in PARTS.items():
        known = former.get(part)
        named = isinstance(known, list) and len(known) == 2 and all(isinstance(item, str) for item in known)
        there = (folder / part).is_dir()
        index[part] = (known if named else list(usual)) if there else [None, None]
    return index


def _write_component(
    model: Path, component: model_folder.Component, config: ModelConfig, folder: Path, report: dict[str, Any]
) -> None:
    file = model / model_folder.weight_file(component)
    architecture = getattr(config, component)
    shapes = model_folder.expected_shapes(component, architecture)
    kinds = stored_weights(file)
    check_tensors(str(file), shapes, kinds)
    with open_weights(file) as opened:
        tensors = Tensors(names.TABLES[component].tensors(shapes), kinds, opened.get_tensor)
        if component == "unet":
            described = diffusers_config.unet_to_diffusers(architecture, config.native_size // config.vae.downsampling)
        else:
            described = diffusers_config.vae_to_diffusers(architecture)
        _write_json(folder / component / "config.json", described)
        _write_torch(folder / component / torch_files.WEIGHTS, tensors)
    report["components"][component] = torch_files.component_report(tensors)


def _write_torch(path: Path, tensors: Tensors) -> None:
    """The file that diffusers reads of a component."""
    ours = {tensor.name: path for path, tensor in tensors.torch.items()}
    kinds = {tensor.name: Stored(tensor.shape, tensors.kinds[path].dtype) for path, tensor in tensors.torch.items()}
    write_streamed(
        path, kinds, lambda name: names.to_torch_layout(ours[name], tensors.read(ours[name])), {"format": "pt"}
    )


def _carry_text(model: Path, config: ModelConfig, folder: Path, report: dict[str, Any]) -> None:
    """Text encoder, tokenizer and processor of a Qwen3-VL model, as they are."""
    for part in torch_files.TEXT_PARTS:
        source = model / config.text.source / part
        if config.text.encoder == "qwen3_vl" and source.is_dir():
            shutil.copytree(source, folder / part)
            report["carried"].append(part)
        else:
            why = "the model folder has none" if config.text.encoder == "qwen3_vl" else f"it is {config.text.encoder}"
            report["absent"][part] = f"{why}; pass {part}=None to from_pretrained"


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    cli.run(main)
