"""Named recipes that turn a float32 .tflite file into a smaller one, by ai-edge-quantizer.

fp16          weights in half precision, computed in float. The text encoder's embedding table stays float32.
int8_dynamic  weights int8 per channel, symmetric; activations quantised at run time. No calibration. The text encoder
              as fp16: eight bits cost MiniLM 8 to 10 per cent of its states, and the picture more than all else. The
              U-Net's projection of text states likewise, where they are not normalised (`TextConfig.state`): a few
              channels hundreds of times larger than the rest take all eight bits of a token.
int8_static   W8A8: weights int8 per channel, activations int8, only in matmuls and convolutions. Both embedding MLPs,
              first and last convolution of the U-Net, every norm and softmax stay in float (recipe of the model's
              author), and the shortcuts of res blocks, the last convolution of the VAE's halves and the products of
              attention's probabilities with its values (ours).
              Calibrated on what the sampler itself visits; weights clipped by least squared error, the clipping of
              activations searched on samples that calibration did not see. The text encoder as fp16.
int4_weights  the text encoder's dense weights int4 in blocks of 32, its embedding table int8, activations quantised at
              run time; the other components as fp16.
"""

import contextlib
import dataclasses
import io
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from dreamlite_jax.errors import UserError

from . import parity
from .audit import Operation, Tensor, operations, random_input, read_metadata
from .resources import cores
from .runtime import SIGNATURE, Runtime, load_component

Recipe = Literal["fp32", "fp16", "int8_dynamic", "int8_static", "int4_weights"]
RECIPES: tuple[Recipe, ...] = get_args(Recipe)
MATMULS = ("FULLY_CONNECTED", "CONV_2D", "DEPTHWISE_CONV_2D", "BATCH_MATMUL")
# Layers of int8_static that stay in float: those of the author's recipe, and the shortcuts of res blocks, which read
# the residual stream as it is and lose more than all else together (`sensitivity`). The last convolution is named after
# the output that it makes.
KEPT = r"conv_in|conv_out|conv_shortcut|time_embedding|add_embedding|serving_default_\w+_output"
TEXT_PROJECTION = "encoder_hid_proj"  # the U-Net's first layer on text states
# What may stand between the products of attention and their softmax.
MOVES = ("RESHAPE", "TRANSPOSE", "SLICE", "CONCATENATION", "ADD")
CLIPS = (1.0, 0.9, 0.8, 0.65)  # of the observed range of activations
CALIBRATION_PROMPTS = (
    "a red car and a yellow star on a blue background",
    "two red hearts on a white background",
    "a photo of a dog in the snow",
    "a green tree above a house",
    "portrait of an old man, oil painting",
    "three apples on a wooden table",
)
CALIBRATION_EDITS = ("make the background green", "remove the star", "turn it into a pencil drawing")

# What a target is known to refuse, so that nobody converts for an hour to learn it.
REFUSED = {
    ("gpu", "int4_weights"): "the GPU accelerator ends on dense weights in blocks of 4 bits; use fp16 or int8_dynamic",
    ("npu", "int8_dynamic"): "NPUs do not quantise activations at run time; use int8_static or fp16",
    ("npu", "int4_weights"): "NPUs do not quantise activations at run time; use int8_static or fp16",
}

Inputs = dict[str, np.ndarray]


@dataclasses.dataclass
class Samples:
    """Inputs of one component and the float32 outputs, as a sampler met them."""

    inputs: list[Inputs] = dataclasses.field(default_factory=list)
    outputs: list[np.ndarray] = dataclasses.field(default_factory=list)

    def split(self, calibration: int, held_out: int = 8) -> tuple["Samples", "Samples"]:
        """(for calibration, held out): of an even choice over all steps and branches, with no sample in both.

        Fewer samples than asked for are shared out in the same proportion.
        """
        chosen = self._even(calibration + held_out)
        count = len(chosen)
        every = max(2, count // max(1, min(held_out, count // 2)))
        held = chosen[every - 1 :: every]
        return self._at(sorted(set(chosen) - set(held))), self._at(held)

    def spread(self, most: int) -> "Samples":
        """An even choice over all steps and branches."""
        return self._at(self._even(most))

    def _even(self, most: int) -> np.ndarray:
        return np.linspace(0, len(self.inputs) - 1, min(most, len(self.inputs))).round().astype(int)

    def _at(self, index: Sequence[int]) -> "Samples":
        return Samples([self.inputs[i] for i in index], [self.outputs[i] for i in index])


def check_target(recipe: Recipe, target: str) -> None:
    """Raises `UserError` for a recipe that the target is known to refuse."""
    if (target, recipe) in REFUSED:
        raise UserError(f"--recipe {recipe} with --target {target}: {REFUSED[target, recipe]}")


def applied(component: str, recipe: Recipe) -> Recipe:
    """The recipe that a component gets: where a recipe of whole numbers leaves it alone, that is fp16."""
    meant = component == "text" if recipe == "int4_weights" else component != "text"
    return recipe if meant and recipe != "fp32" else "fp16"


def visit(folder: Path, prompts: Sequence[str] = CALIBRATION_PROMPTS, steps: int | None = None) -> dict[str, Samples]:
    """Samples of every component from generating with all prompts and editing what was made, in float32.

    Where the text encoder would have to see the picture nothing is edited; the pictures are encoded all the same.
    """
    found: dict[str, Samples] = {}

    def observe(component: str, inputs: Inputs, output: np.ndarray) -> None:
        samples = found.setdefault(component, Samples())
        samples.inputs.append({name: value.copy() for name, value in inputs.items()})
        samples.outputs.append(parity.meaningful(inputs, output))

    runtime = Runtime(folder, keep_loaded=True, observer=observe)
    for seed, prompt in enumerate(prompts):
        image = np.clip(runtime.generate(prompt, seed=seed, steps=steps), -1.0, 1.0)
        if runtime.reads_pictures:
            runtime.encode_image(image)
        else:
            edit = CALIBRATION_EDITS[seed % len(CALIBRATION_EDITS)]
            runtime.generate(edit, image, seed=seed, steps=steps)
    return found


def quantize(
    source: Path,
    target: Path,
    component: str,
    recipe: Recipe,
    calibration: Samples | None = None,
    held_out: Samples | None = None,
) -> dict[str, Any]:
    """Writes the quantised form of a float32 file and returns what was chosen on the way.

    Args:
      calibration, held_out: needed by int8_static, for every component but text.

    Raises:
      UserError: int8_static without samples.
    """
    recipe = applied(component, recipe)
    if recipe == "int8_static":
        if calibration is None or held_out is None:
            raise UserError(
                "recipe int8_static is calibrated on what the sampler visits, which needs every component: "
                "use --component all"
            )
        return _static(source, target, calibration, held_out)
    quantizer = _quantizer(source)
    _add_weights_only(quantizer, component, recipe)
    if recipe == "int8_dynamic" and component == "unet" and _text_state(source) == "before_norm":
        _keep_in_half(quantizer, TEXT_PROJECTION)
    _write(quantizer.quantize(enable_progress_report=False, enable_progress_bar=False), target)
    return {}


def _quantizer(source: Path) -> Any:
    from ai_edge_quantizer import quantizer

    return quantizer.Quantizer(str(source))


def _add_weights_only(quantizer: Any, component: str, recipe: Recipe) -> None:
    """Recipes that need no calibration."""
    from ai_edge_quantizer import algorithm_manager, qtyping

    names = qtyping.TFLOperationName
    algorithm, blocks = algorithm_manager.AlgorithmName, qtyping.QuantGranularity
    if recipe == "int8_dynamic":
        quantizer.add_dynamic_config(".*", names.ALL_SUPPORTED, 8)
    elif recipe == "int4_weights":
        quantizer.add_dynamic_config(".*", names.EMBEDDING_LOOKUP, 8)
        quantizer.add_dynamic_config(
            ".*", names.FULLY_CONNECTED, 4, granularity=blocks.BLOCKWISE_32, algorithm_key=algorithm.OCTAV
        )
    else:
        # GPUs refuse a half precision table behind EMBEDDING_LOOKUP, and 8 bits lose twenty times what the rest loses.
        kinds = [names.FULLY_CONNECTED] if component == "text" else [names.ALL_SUPPORTED]
        for kind in kinds:
            quantizer.add_weight_only_config(".*", kind, 16, algorithm_key=algorithm.FLOAT_CASTING)


def _text_state(source: Path) -> str | None:
    """Which state of its text encoder the model of a float32 file reads."""
    return read_metadata(source).get("config", {}).get("text", {}).get("state")


def _keep_in_half(quantizer: Any, layer: str) -> None:
    """Dense layers of this name keep weights of half precision, and activations in float."""
    from ai_edge_quantizer import algorithm_manager, qtyping

    casting = algorithm_manager.AlgorithmName.FLOAT_CASTING
    quantizer.add_weight_only_config(
        f".*{layer}.*", qtyping.TFLOperationName.FULLY_CONNECTED, 16, algorithm_key=casting
    )


def _static(source: Path, target: Path, calibration: Samples, held_out: Samples) -> dict[str, Any]:
    """W8A8 with the clipping of activations that loses least on held-out samples."""
    ranges = _observed_ranges(source, calibration.inputs)
    losses: dict[float, float] = {}
    for clip in CLIPS:
        trial = target.with_name(f".{target.name}.{clip}.part")
        quantizer = _static_quantizer(source)
        _write(
            quantizer.quantize(_clipped(ranges, clip), enable_progress_report=False, enable_progress_bar=False), trial
        )
        check_kept(source, trial)
        losses[clip] = relative_rms(trial, held_out)
        if losses[clip] <= min(losses.values()):
            os.replace(trial, target)
        else:
            trial.unlink()
    best = min(losses, key=losses.__getitem__)
    return {
        "calibration_samples": len(calibration.inputs),
        "held_out_samples": len(held_out.inputs),
        "clip": best,
        "relative_rms_by_clip": {str(clip): loss for clip, loss in losses.items()},
        "kept_in_float": kept_layers(source),
    }


def _static_quantizer(source: Path) -> Any:
    from ai_edge_quantizer import algorithm_manager, qtyping

    names, algorithm = qtyping.TFLOperationName, algorithm_manager.AlgorithmName
    quantizer = _quantizer(source)
    for kind in MATMULS:
        # BATCH_MATMUL has no weights to clip.
        key = algorithm.MIN_MAX_UNIFORM_QUANT if kind == "BATCH_MATMUL" else algorithm.MSE
        quantizer.add_static_config(".*", names(kind), 8, 8, algorithm_key=key)
    _keep(quantizer, source)
    return quantizer


def _keep(quantizer: Any, source: Path) -> None:
    """Rules for `kept_operations`, each by the whole name of its operation."""
    from ai_edge_quantizer import algorithm_manager, qtyping

    for op in kept_operations(source):
        quantizer.update_quantization_recipe(
            regex=f"^{re.escape(op.outputs[0].name)};",
            operation_name=qtyping.TFLOperationName(op.kind),
            algorithm_key=algorithm_manager.AlgorithmName.NO_QUANTIZE,
        )


def kept_operations(source: Path) -> list[Operation]:
    """Matmuls and convolutions of a float32 file that stay in float: `KEPT`, and probabilities times values.

    One range in 8 bits holds all probabilities of a layer. Where one query is sure of its key the step is 1 / 255, and
    what the others spread over hundreds of keys rounds to nothing.

    Raises:
      RuntimeError: a file whose attention is not seen: some product of activations neither leads to a softmax nor reads
        one.
    """
    ops = list(operations(source))
    makers = {tensor.name: op for op in ops for tensor in op.outputs}

    def behind(tensor: Tensor) -> Iterator[Operation]:
        """What made a tensor, seen through operations that move or shift numbers and nothing else."""
        maker = makers.get(tensor.name)
        if maker is not None and maker.kind in MOVES:
            for each in maker.inputs:
                yield from behind(each)
        elif maker is not None:
            yield maker

    products = [op for op in ops if op.kind in MATMULS and not op.inputs[1].constant]
    mixes = [op for op in products if any(maker.kind == "SOFTMAX" for maker in behind(op.inputs[0]))]
    scores = [maker for op in ops if op.kind == "SOFTMAX" for maker in behind(op.inputs[0])]
    known = {op.outputs[0].name for op in mixes + scores}
    for op in products:
        if op.outputs[0].name not in known:
            raise RuntimeError(
                f"{source}: the product of activations in {op.layer} neither leads to a softmax nor reads one, so "
                "int8_static cannot tell what of this attention has to stay in float"
            )
    named = [op for op in ops if op.kind in MATMULS and re.search(KEPT, op.outputs[0].name)]
    return named + mixes


def check_kept(source: Path, target: Path) -> None:
    """Raises RuntimeError when something of `kept_operations` is not in float in the quantised file."""
    made = {op.outputs[0].name: op for op in operations(target) if op.kind in MATMULS}
    for op in kept_operations(source):
        found = made.get(op.outputs[0].name)
        if found is None or any(tensor.dtype != "FLOAT32" for tensor in found.inputs[:2]):
            raise RuntimeError(f"{target}: {op.layer} was to stay in float and did not")


def _observed_ranges(source: Path, inputs: Sequence[Inputs]) -> dict[str, Any]:
    """Smallest and largest value of every tensor over all samples."""
    from ai_edge_quantizer import calibrator, recipe_manager
    from ai_edge_quantizer.utils import qsv_utils

    manager = recipe_manager.RecipeManager()
    manager.load_quantization_recipe(_static_quantizer(source).get_quantization_recipe())
    observer = calibrator.Calibrator(str(source), num_threads=cores(), qsv_update_func=qsv_utils.min_max_update)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar has no switch
        observer.calibrate({SIGNATURE: list(inputs)}, manager)
    return observer.get_model_qsvs()


def _clipped(ranges: dict[str, Any], clip: float) -> dict[str, Any]:
    """The ranges with both ends drawn towards zero."""
    return {
        name: {key: value * np.float32(clip) if key in ("min", "max") else value for key, value in entry.items()}
        for name, entry in ranges.items()
    }


def kept_layers(source: Path) -> list[str]:
    """Layers of `kept_operations`."""
    return [op.layer for op in kept_operations(source)]


def relative_rms(path: Path, samples: Samples) -> float:
    """A file's difference from the float32 outputs over theirs; the worst sample counts. Not finite: infinite."""
    found = compare(path, samples, parity.FLOORS["fp32"]).relative_rms
    return found if np.isfinite(found) else np.inf


def random_samples(path: Path, count: int = 2) -> Samples:
    """Random inputs of a float32 file and its outputs, for a component converted alone."""
    ports = read_metadata(path)["inputs"]
    run = load_component(path.parent, {"files": {"it": path.name}}, "it", 0)
    inputs = [{port["name"]: random_input(port, seed) for port in ports} for seed in range(count)]
    return Samples(inputs, [parity.meaningful(some, run(**some)) for some in inputs])


def compare(path: Path, samples: Samples, floor: parity.Floor) -> parity.Parity:
    """A quantised file beside the float32 outputs."""
    run = load_component(path.parent, {"files": {"it": path.name}}, "it", 0)
    found = [parity.meaningful(inputs, run(**inputs)) for inputs in samples.inputs]
    return parity.measure(samples.outputs, found, floor)


def sensitivity(source: Path, calibration: Samples, held_out: Samples) -> list[dict[str, Any]]:
    """Relative RMS of the output when one module alone is W8A8 and all else is float32, worst first.

    A module is two levels of the layer's name (down_blocks_0/resnets_0). What stands on top is what to keep in float.
    """
    from ai_edge_quantizer import algorithm_manager, qtyping

    ranges = _observed_ranges(source, calibration.inputs)
    groups: dict[str, int] = {}
    kept = {op.outputs[0].name for op in kept_operations(source)}
    for op in operations(source):
        if op.kind in MATMULS and op.outputs[0].name not in kept:
            name = "/".join(op.layer.split("/")[:2])
            groups[name] = groups.get(name, 0) + 1
    rows = []
    trial = source.with_name(f".{source.name}.sensitivity.part")
    for group, count in groups.items():
        quantizer = _quantizer(source)
        for kind in MATMULS:
            quantizer.add_static_config(
                rf".*/{re.escape(group)}/.*",
                qtyping.TFLOperationName(kind),
                8,
                8,
                algorithm_key=algorithm_manager.AlgorithmName.MIN_MAX_UNIFORM_QUANT,
            )
        _keep(quantizer, source)
        _write(quantizer.quantize(ranges, enable_progress_report=False, enable_progress_bar=False), trial)
        rows.append({"module": group, "operations": count, "relative_rms": relative_rms(trial, held_out)})
        trial.unlink()
    return sorted(rows, key=lambda row: -row["relative_rms"])


def _write(result: Any, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.writing")
    result.export_model(str(temporary), overwrite=True)
    os.replace(temporary, path)
