"""Converted files: what is in them, and that the gates on them can fail."""

import dataclasses
import functools
import json
import shutil

import flatbuffers
import jax.numpy as jnp
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from conversion import audit, exports, litert, outputs, parity, quantize, resources, to_litert
from conversion.graph import Graph, Port, Sizes
from conversion.runtime import load_component
from dreamlite_jax.config import ModelConfig
from dreamlite_jax.errors import UserError

COMPONENTS = ("unet", "vae_encoder", "vae_decoder", "text")


@pytest.fixture(scope="module")
def report(litert_model):
    return json.loads((litert_model / "report.json").read_text())


def test_every_component_keeps_its_numbers(report):
    assert set(report["components"]) == set(COMPONENTS)
    for row in report["components"].values():
        assert row["parity"]["max_abs"] <= 2e-5 * max(1.0, row["parity"]["peak"])
        assert row["parity"]["passed"]
    assert report["picture"]["psnr_db"] >= 60
    assert report["passed"]


def test_only_builtin_operations_of_four_dimensions(litert_model, report):
    for name in COMPONENTS:
        found = audit.audit(litert_model / f"{name}.tflite")
        assert found.faults == ()
        assert found.file_bytes == report["components"][name]["file_bytes"]
    ops = report["components"]["unet"]["ops"]
    assert ops["GELU"] == 5 and ops["RESIZE_NEAREST_NEIGHBOR"] == 1 and ops["DEPTHWISE_CONV_2D"] > 0
    assert "GATHER" not in ops and "TRANSPOSE" not in ops


def test_the_file_says_what_it_is(litert_model, report):
    metadata = audit.read_metadata(litert_model / "unet.tflite")
    assert metadata["component"] == "unet" and metadata["recipe"] == "fp32"
    assert [port["name"] for port in metadata["inputs"]] == [
        "sample",
        "time_features",
        "size_features",
        "text",
        "text_bias",
    ]
    assert metadata["inputs"] == report["components"]["unet"]["inputs"]
    assert metadata["config"] == json.loads((litert_model / "model.json").read_text())["config"]


def test_a_file_of_other_weights_misses_the_floor(small_model, litert_model):
    """Negative control of the parity gate."""
    from dreamlite_jax import model_folder

    config = model_folder.load_config(small_model)
    params = model_folder.load_params(small_model, "vae")
    params["decoder"]["layers_0"]["bias"] += 1e-3
    manifest = json.loads((litert_model / "model.json").read_text())
    sizes = Sizes(**manifest["sizes"])
    converted = functools.partial(load_component, litert_model, manifest, "vae_decoder", 1)
    floor = parity.FLOORS["fp32"]
    found = parity.compare("vae_decoder", config, sizes, lambda: (params, None), converted, floor)
    assert not found.passed


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("recipe", ["fp32", "int8_static"])
def test_what_is_not_finite_never_passes(recipe, value):
    good, floor = np.ones((2, 2), np.float32), parity.FLOORS[recipe]
    bad = np.array([[1, value], [1, 1]], np.float32)
    assert parity.measure([good, good], [good, good], floor).passed
    for found in ([bad, good], [good, bad]):
        assert not parity.measure([good, good], found, floor).passed
        assert not np.isfinite(parity.measure([good, good], found, floor).max_abs)
    with np.errstate(invalid="ignore"):
        assert not parity.measure([good, bad], [good, bad], floor).passed


def test_a_missed_floor_is_exit_code_one(small_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(parity.FLOORS, "fp32", parity.Floor(0.0, 0.0, 40.0))
    output = tmp_path / "out"
    code = to_litert.main(["--model", str(small_model), "--output", str(output), "--component", "vae_decoder"])
    assert code == 1
    assert "MISSED" in capsys.readouterr().out
    assert json.loads((output / "report.json").read_text())["passed"] is False
    monkeypatch.undo()
    again = ["--model", str(small_model), "--output", str(output), "--component", "vae_decoder", "--replace"]
    assert to_litert.main(again) == 0  # as the quick start goes on after a missed floor


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--height", "40"], "height 40"),
        (["--width", "0"], "width 0"),
        (["--sensitivity"], "another --recipe than fp32"),
        (["--text_length", "16"], r"text_length is 16; .* must be at least 17"),
        (["--text_length", "30", "--recipe", "fp16"], r"must be at least \d\d"),
        (["--text_length", "99"], "text_length is 99"),
        (["--batch", "0"], "batch is 0"),
    ],
)
def test_bad_flags_are_named_before_any_work(small_model, tmp_path, flags, named):
    with pytest.raises(UserError, match=named):
        to_litert.main(["--model", str(small_model), "--output", str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def test_a_folder_in_use_is_left_alone(small_model, tmp_path):
    (tmp_path / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match="not empty"):
        to_litert.main(["--model", str(small_model), "--output", str(tmp_path)])
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match=r"mine\.txt is a file"):
        to_litert.main(["--model", str(small_model), "--output", str(tmp_path / "mine.txt" / "below")])


def test_replace_takes_the_place_and_leftovers_of_killed_processes_go(tmp_path):
    output = tmp_path / "out"
    for name in ("out/old", ".out.12345678.part/x", ".out.other.12345678.part/x"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("old")
    with outputs.new_folder(output, replace=True) as folder, outputs.new_folder(output, replace=True) as second:
        assert folder.is_dir() and second.is_dir()  # one that is being filled is no leftover
        (folder / "new").write_text("new")
    assert {path.name for path in tmp_path.iterdir()} == {"out", ".out.other.12345678.part"}
    with pytest.raises(UserError, match="not empty"), outputs.new_folder(output):
        pass


def test_a_model_folder_without_a_component_is_refused(small_model, tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    shutil.copytree(small_model, broken)
    (broken / "vae.safetensors").unlink()
    monkeypatch.setattr(litert, "convert", None)  # nothing is converted before the message
    with pytest.raises(UserError, match=r"lacks vae\.safetensors"):
        to_litert.main(["--model", str(broken), "--output", str(tmp_path / "out")])


def test_weights_beyond_memory_or_format_are_refused(tmp_path, monkeypatch, capsys):
    weights = {"vae_decoder": 10**7, "unet": 10**9}
    exports.check_resources({"vae_decoder": 10**5}, tmp_path / "new" / "folder")
    assert "0.7 GB of memory and 0.0 GB of disk" in capsys.readouterr().err
    monkeypatch.setattr(resources, "available_memory", lambda: 4 * 10**9)
    with pytest.raises(UserError, match=r"converting unet takes 4\.7 GB of memory; 4\.0 GB"):
        exports.check_resources(weights, tmp_path)
    monkeypatch.setattr(resources, "available_memory", lambda: None)
    monkeypatch.setattr(resources, "available_disk", lambda folder: 15 * 10**8)
    exports.check_resources(weights, tmp_path)
    with pytest.raises(UserError, match=r"files take 1\.6 GB of disk; 1\.5 GB"):
        exports.check_resources(weights, tmp_path, extra=0.55)
    with pytest.raises(UserError, match=r"unet has 3\.00 GB .* holds at most 2\.15 GB"):
        exports.check_resources({"unet": 3 * 10**9}, tmp_path, largest_file=litert.LARGEST_FILE)


def test_the_memory_of_a_control_group_counts(tmp_path):
    for name, text in {
        "proc/meminfo": "MemTotal: 9000 kB\nMemAvailable: 8000 kB\n",
        "proc/self/cgroup": "0::/some/group\n",
        "sys/fs/cgroup/some/memory.max": "5000000\n",
        "sys/fs/cgroup/some/memory.current": "3000000\n",
        "sys/fs/cgroup/some/memory.stat": "anon 1\ninactive_file 1000000\n",
        "sys/fs/cgroup/some/group/memory.max": "max\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert resources.available_memory(tmp_path) == 3_000_000
    (tmp_path / "proc/self/cgroup").unlink()
    assert resources.available_memory(tmp_path) == 8000 * 1024


def test_the_largest_scores_are_those_of_any_attention():
    """At 1024 pixels cross-attention of the first level, which has no self-attention, beats what lies below."""
    config, sizes = ModelConfig(), Sizes(1024, 1024, 512)
    unet, tokens = config.unet, 128 * 256
    assert (unet.down_blocks[0], unet.num_kv_heads) == ("cross", 1)
    whole = 4 * tokens * unet.num_heads[0] * 512
    assert to_litert.attention_bytes(config, sizes) == {"whole": whole, "as_exported": whole}
    sizes = dataclasses.replace(sizes, attention_chunk=100)
    shared = to_litert.attention_bytes(config, sizes)["as_exported"]
    config = dataclasses.replace(config, unet=dataclasses.replace(unet, num_kv_heads=None))
    assert to_litert.attention_bytes(config, sizes)["as_exported"] > shared  # a chunk of every head


@pytest.mark.parametrize("recipe, others", [("int8_dynamic", "int8_dynamic"), ("int4_weights", "fp16")])
def test_parts_that_a_recipe_casts_are_judged_as_casts(recipe, others):
    assert quantize.applied("unet", recipe) == quantize.applied("vae_decoder", recipe) == others
    assert {quantize.applied("text", recipe), others} == {recipe, "fp16"}
    assert quantize.applied("text", "int8_static") == quantize.applied("text", "fp16") == "fp16"


# --- the audit's negative controls


def tiny_graph(apply) -> Graph:
    ports = (Port("x", (2, 4), "float32", ""), Port("y", (2, 4), "float32", ""))
    return Graph("unet", ports[:1], ports[1], {"k": np.eye(4, dtype=np.float32)}, apply)


def test_five_dimensions_are_named(tmp_path):
    path = tmp_path / "five.tflite"
    five = tiny_graph(lambda p, x: (x @ p["k"]).reshape(1, 2, 1, 2, 2).transpose(4, 3, 2, 1, 0).reshape(2, 4))
    litert.convert(five, path, {})
    assert any("5 dimensions" in fault for fault in audit.audit(path).faults)


@pytest.mark.parametrize("fault", ["FlexErf", "my_op", "INT64"])
def test_custom_and_wide_are_named(tmp_path, fault):
    path = tmp_path / "tiny.tflite"
    litert.convert(tiny_graph(lambda p, x: jnp.exp(x @ p["k"])), path, {})
    assert audit.audit(path).faults == ()
    model = schema.ModelT.InitFromObj(schema.Model.GetRootAs(path.read_bytes(), 0))
    if fault == "INT64":
        model.subgraphs[0].tensors[model.subgraphs[0].operators[0].outputs[0]].type = schema.TensorType.INT64
    else:
        code = model.operatorCodes[model.subgraphs[0].operators[0].opcodeIndex]
        code.builtinCode, code.deprecatedBuiltinCode = schema.BuiltinOperator.CUSTOM, schema.BuiltinOperator.CUSTOM
        code.customCode = fault
    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    assert any(fault.upper() in found.upper() for found in audit.audit(path).faults)


def test_what_is_no_model_is_refused(tmp_path):
    (tmp_path / "x.tflite").write_bytes(b"not a model at all")
    with pytest.raises(UserError, match="not a LiteRT model"):
        audit.audit(tmp_path / "x.tflite")


def test_weights_that_are_computed_in_every_call_are_named(tmp_path):
    path = tmp_path / "scaled.tflite"
    kernel = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    ports = (Port("x", (2, 64), "float32", ""), Port("y", (2, 64), "float32", ""))
    scaled = Graph("unet", ports[:1], ports[1], {"k": kernel}, lambda p, x: (x @ p["k"].T) * 0.5)
    litert.convert(scaled, path, {})
    assert any("computed at run time" in fault for fault in audit.audit(path).faults)
