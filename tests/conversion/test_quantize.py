"""Quantised files: how large, how close, and what stays in float."""

import json

import numpy as np
import pytest

from conversion import audit, parity, quantize, to_litert
from dreamlite_jax.errors import UserError


@pytest.fixture(scope="module")
def visited(litert_model):
    return quantize.visit(litert_model, prompts=quantize.CALIBRATION_PROMPTS[:2], steps=3)


def test_the_sampler_visits_every_component(visited):
    assert set(visited) == {"unet", "vae_encoder", "vae_decoder", "text"}
    # Two prompts, each generated (two branches) and edited (three branches), in three steps.
    assert len(visited["unet"].inputs) == len(visited["unet"].outputs) == 2 * (2 + 3) * 3
    noises = {inputs["time_features"].tobytes() for inputs in visited["unet"].inputs}
    assert len(noises) == 3


def test_no_sample_is_both_calibrated_on_and_held_out(visited):
    for samples in visited.values():
        calibration, held_out = samples.split(calibration=8, held_out=4)
        assert calibration.inputs and held_out.inputs
        assert not {id(x) for x in calibration.inputs} & {id(x) for x in held_out.inputs}
        assert len(calibration.inputs) + len(held_out.inputs) <= 12


@pytest.mark.parametrize("recipe, most, share", [("fp16", 5e-3, 0.8), ("int8_dynamic", 0.1, 0.6)])
def test_weights_shrink_and_numbers_stay(litert_model, visited, tmp_path, recipe, most, share):
    source, target = litert_model / "unet.tflite", tmp_path / "unet.tflite"
    quantize.quantize(source, target, "unet", recipe)
    assert 0 < quantize.relative_rms(target, visited["unet"]) < most
    assert target.stat().st_size < share * source.stat().st_size
    assert audit.audit(target).faults == ()
    assert audit.read_metadata(target)["component"] == "unet"


def test_static_keeps_embeddings_and_ends_in_float(litert_model, visited, tmp_path):
    source, target = litert_model / "unet.tflite", tmp_path / "unet.tflite"
    calibration, held_out = visited["unet"].split(calibration=16)
    report = quantize.quantize(source, target, "unet", "int8_static", calibration, held_out)
    assert {"conv_in", "time_embedding/linear_1", "add_embedding/linear_2"} <= set(report["kept_in_float"])
    assert report["relative_rms_by_clip"][str(report["clip"])] == min(report["relative_rms_by_clip"].values())
    assert quantize.relative_rms(target, held_out) < 0.3
    floats, integers = [], []
    for op in audit.operations(target):
        if op.kind in quantize.MATMULS:
            (floats if op.inputs[1].dtype == "FLOAT32" else integers).append(op)
    assert len(floats) == len(report["kept_in_float"])
    assert all(op.inputs[0].dtype == op.inputs[1].dtype == "INT8" for op in integers)
    assert len(integers) > len(floats)


def test_calibration_beyond_memory_is_refused(litert_model, small_model, tmp_path, monkeypatch):
    """All activations together are more than those that are alive at once, which a run takes."""
    path = litert_model / "vae_decoder.tflite"
    assert audit.preserved_bytes(path) > 2 * audit.activation_bytes(path)
    row = {"file": path.name, "file_bytes": path.stat().st_size}
    monkeypatch.setattr(to_litert, "convert_one", lambda *_: row)
    monkeypatch.setattr(audit, "preserved_bytes", lambda _: 10**15)
    flags = ["--recipe", "int8_static", "--target", "npu"]
    with pytest.raises(UserError, match=r"calibrating unet takes 1000000\.0 GB of memory"):
        to_litert.main(["--model", str(small_model), "--output", str(tmp_path / "out"), *flags])


def test_sensitivity_names_the_modules_that_lose_most(litert_model, visited):
    calibration, held_out = visited["vae_decoder"].split(calibration=2)
    rows = quantize.sensitivity(litert_model / "vae_decoder.tflite", calibration, held_out)
    losses = [row["relative_rms"] for row in rows]
    assert losses == sorted(losses, reverse=True) and losses[0] > 0
    assert sum(row["operations"] for row in rows) == 16
    assert not list(litert_model.glob(".*.part"))


def test_a_clip_that_spoils_a_file_does_not_win(litert_model, visited, tmp_path, monkeypatch):
    """A NaN in any sample but the first is no smaller loss than a number."""
    samples = visited["vae_decoder"].spread(2)
    calls = iter(range(10))

    def load(*_):
        def run(**inputs):
            return samples.outputs[next(calls)] * np.float32(np.nan if next(spoiled) else 1.5)

        return run

    spoiled = iter([False, True])
    monkeypatch.setattr(quantize, "load_component", load)
    assert quantize.relative_rms(tmp_path / "any.tflite", samples) == np.inf
    calls, spoiled = iter(range(10)), iter([False, False])
    assert quantize.relative_rms(tmp_path / "any.tflite", samples) == pytest.approx(0.5)


def test_text_states_of_padding_do_not_count(visited):
    inputs = visited["text"].inputs[0]
    output = np.ones((*inputs["token_ids"].shape, 3), np.float32)
    kept = parity.meaningful(inputs, output)
    assert kept.sum() == 3 * (inputs["text_bias"] == 0).sum() < output.sum()


def test_the_command_writes_a_quantised_folder(small_model, tmp_path):
    output = tmp_path / "half"
    assert to_litert.main(["--model", str(small_model), "--output", str(output), "--recipe", "fp16"]) == 0
    report = json.loads((output / "report.json").read_text())
    for row in report["components"].values():
        assert row["quantized"]["file_bytes"] < row["file_bytes"]
        assert row["quantized"]["parity_on"] == "inputs of the sampler"
    assert not {"peak_memory_bytes"} & set(report["components"]["unet"]) and report["peak_memory_bytes"] > 0
    assert report["picture"]["psnr_db"] >= parity.FLOORS["fp16"].psnr_db
    names = {path.name for path in output.iterdir()}
    assert names == {f"{c}.tflite" for c in report["components"]} | {"model.json", "report.json", "tokenizer.json"}


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--recipe", "int8_static", "--component", "unet", "--target", "npu"], "needs every component"),
        (["--recipe", "int8_dynamic", "--target", "npu"], "int8_static or fp16"),
        (["--recipe", "int4_weights", "--target", "gpu"], "fp16 or int8_dynamic"),
        (["--recipe", "int8_static", "--target", "npu", "--calibration_samples", "0"], "calibration_samples is 0"),
    ],
)
def test_recipes_that_cannot_work_are_refused_at_once(small_model, tmp_path, flags, named):
    with pytest.raises(UserError, match=named):
        to_litert.main(["--model", str(small_model), "--output", str(tmp_path / "out"), *flags])
