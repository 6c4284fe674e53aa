"""The released judges against transformers: small random models in the released layout, real prompts and tokenizer."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import older_transformers
import pytest
import reward_oracle
import safetensors.numpy
from flax import traverse_util
from reward_oracle import CASES, PROMPTS, ROWS, SHOWN, Oracle, random_pictures, shown_pictures, small_form

from dreamlite_jax.errors import UserError
from dreamlite_jax.models.qwen_vl import rope
from dreamlite_jax.rewards.base import Context
from dreamlite_jax.rewards.config import RewardConfig
from dreamlite_jax.rewards.images import CLIP_448, NATIVE
from dreamlite_jax.rewards.judges import EDIT_REWARD, HPSV3, Judge, JudgeTokenizer
from dreamlite_jax.rewards.load import check_chat, load_judge
from dreamlite_jax.rewards.network import head_names

SCORE_TOLERANCE = 1e-5  # scores are of order 1
GRADIENT_TOLERANCE = 1e-3  # relative, in the 2-norm


@dataclasses.dataclass(frozen=True)
class Case:
    """A judge of ours beside its oracle, and what both say of the same two pictures."""

    oracle: Oracle
    judge: Judge
    context: Context
    images: np.ndarray
    expected: np.ndarray  # (b, h, 2)
    gradient: np.ndarray  # of the sum of scores with respect to images
    folder: Path


def small_judge(kind: str, folder: Path) -> Judge:
    """The judge of a folder that `Oracle.save` wrote."""
    form, backbone = small_form(kind), CASES[kind][1]
    loaded = load_judge(
        RewardConfig(
            "hpsv3" if kind == "hpsv3" else "editreward", checkpoint=str(folder / "checkpoint.safetensors"),
            base=str(folder / "base"), backbone=backbone, tasks=("edit",) if form.sees_source else ("generate",),
            dtype="float32", prompt_tokens=24, size_px=SHOWN,
        )
    )  # fmt: skip
    network, params, tokenizer = loaded.network, loaded.params, loaded.tokenizer
    return Judge(network, params, form, tokenizer, height=SHOWN[0], width=SHOWN[1], prompt_tokens=24)


@pytest.fixture(scope="module", params=["hpsv3", "editreward", pytest.param("editreward3", marks=pytest.mark.slow)])
def case(request, tmp_path_factory):
    import torch

    kind, (family, _, _) = request.param, CASES[request.param]
    form = small_form(kind)
    oracle = Oracle.of(family, form)
    folder = tmp_path_factory.mktemp(kind)
    oracle.save(folder, old_names=kind == "hpsv3")
    judge = small_judge(kind, folder)
    images, source = shown_pictures()
    context = Context(judge.prepare(PROMPTS), source, np.zeros_like(source), np.ones(2, np.float32))
    leaf = torch.from_numpy(images).requires_grad_(True)
    pictures = [torch.from_numpy(source), leaf] if form.sees_source else [leaf]
    outputs = oracle.outputs(PROMPTS, pictures, form.rule.size(*SHOWN, judge.network.config.vision))
    outputs[:, :, 0].mean(1).sum().backward()
    return Case(oracle, judge, context, images, outputs.detach().numpy(), leaf.grad.numpy(), folder)


@pytest.fixture(scope="module")
def patches(case):
    """What the network gets for this case's pictures."""
    shown = [case.context.source, case.images] if case.judge.form.sees_source else [case.images]
    return [case.judge.form.rule.patches(picture, case.judge.network.config.vision) for picture in shown]


@pytest.fixture(scope="module")
def ask(case):
    """(tokens, patches, params of another network) -> (b, h, 2), compiled once for all controls."""
    network, grid = case.judge.network, case.judge.grid

    @jax.jit
    def run(params, tokens, patches):
        return network.apply(
            {"params": params}, tokens["ids"], tokens["mask"], tokens["positions"], patches, grid
        )  # fmt: skip

    return lambda tokens, patches, params=None: np.asarray(run(params or case.judge.params, tokens, patches))


def test_scores_and_gradients_equal_transformers(case):
    def total(images: Any) -> tuple[Any, Any]:
        scores = case.judge(case.judge.params, images, case.context)
        return scores.sum(), scores

    (_, scores), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(jnp.asarray(case.images))
    assert scores.dtype == jnp.float32
    assert np.abs(case.expected).max() > 0.1
    assert np.abs(np.diff(case.expected[:, :, 0], axis=0)).max() > 1e-2  # the two samples are told apart
    np.testing.assert_allclose(scores, case.expected[:, :, 0].mean(1), atol=SCORE_TOLERANCE, rtol=0)
    assert np.linalg.norm(case.gradient) > 1e-3
    relative = np.linalg.norm(gradient - case.gradient) / np.linalg.norm(case.gradient)
    assert relative <= GRADIENT_TOLERANCE


def test_every_output_equals_transformers(case, ask, patches):
    np.testing.assert_allclose(ask(case.context.tokens, patches), case.expected, atol=SCORE_TOLERANCE, rtol=0)


# The versions that the judges' code asks for: HPSv3's pyproject "at least" (its code of today needs 4.52), EditReward's
# README at its release, and since it knows Qwen3-VL.
RELEASED_WITH = [("hpsv3", "4.45.2"), ("hpsv3", "4.57.3"), ("editreward", "4.56.1"), ("editreward3", "4.57.0")]


@pytest.mark.slow
@pytest.mark.parametrize("kind, version", RELEASED_WITH)
def test_outputs_equal_the_transformers_of_the_release(kind, version, tmp_path):
    """In a process of its own; heads read the normalised state there, and a tower without the norm is told apart."""
    older = older_transformers.install(version, tmp_path / "older")
    code = "import sys, pathlib, reward_oracle; reward_oracle.record(sys.argv[1], pathlib.Path(sys.argv[2]))"
    older_transformers.run(code, kind, str(tmp_path), older=older)
    with np.load(tmp_path / "said.npz") as file:
        said = dict(file)
    assert str(said["version"]) == version
    judge = small_judge(kind, tmp_path)
    images, source = shown_pictures()
    context = Context(judge.prepare(PROMPTS), source, np.zeros_like(source), np.ones(2, np.float32))
    text = dataclasses.replace(judge.network.config.text, final_norm=False)
    bare = judge.network.clone(config=dataclasses.replace(judge.network.config, text=text))
    found = {}
    for state, network in (("after_norm", judge.network), ("before_norm", bare)):
        asked = Judge(
            network, judge.params, judge.form, judge.tokenizer, height=SHOWN[0], width=SHOWN[1], prompt_tokens=24
        )
        outputs = np.asarray(jax.jit(asked.outputs)(judge.params, images, context))
        found[state] = float(np.abs(outputs - said["outputs"]).max())
    before, after = said["distances"]
    print(f"{kind}, transformers {version}: heads read the norm's output ({after:.1e} from it, {before:.1e} from its "
          f"input); ours after_norm {found['after_norm']:.1e}, before_norm {found['before_norm']:.1e}")  # fmt: skip
    assert after == 0.0 and before > 0.1
    assert found["after_norm"] <= SCORE_TOLERANCE
    assert found["before_norm"] > 20 * SCORE_TOLERANCE


def wrong_positions(judge: Judge, tokens: dict[str, np.ndarray]) -> np.ndarray:
    """Row and column where the form counts words, and the reverse."""
    other = "grid" if judge.form.positions == "flat" else "flat"
    twisted = Judge(
        judge.network, {}, dataclasses.replace(judge.form, positions=other), judge.tokenizer, height=SHOWN[0],
        width=SHOWN[1], prompt_tokens=24,
    )  # fmt: skip
    return twisted.positions(tokens["ids"], tokens["mask"])


def test_what_is_wrong_is_seen(case, ask, patches):
    judge, tokens, vision = case.judge, case.context.tokens, case.judge.network.config.vision
    other = NATIVE if judge.form.rule.mean == CLIP_448.mean else CLIP_448
    statistics = dataclasses.replace(judge.form.rule, mean=other.mean, std=other.std)
    reading_order = np.argsort(np.ravel_multi_index(rope.patch_order(judge.grid, 2), judge.grid))
    wrong = {
        "positions": ask({**tokens, "positions": wrong_positions(judge, tokens)}, patches),
        "mean and std": ask(tokens, [*patches[:-1], statistics.patches(case.images, vision)]),
        "merge order": ask(tokens, [*patches[:-1], patches[-1][:, reading_order]]),
        "prompt": ask(judge.prepare(PROMPTS[::-1]), patches),
        "head column": ask(tokens, patches)[:, :, ::-1],
    }
    if judge.form.sees_source:
        wrong["source after the edit"] = ask(tokens, patches[::-1])
        wrong["texts swapped"] = ask({name: value[:, ::-1] for name, value in tokens.items()}, patches)
    distances = {name: float(np.abs(found - case.expected)[:, :, 0].max()) for name, found in wrong.items()}
    assert min(distances.values()) > 20 * SCORE_TOLERANCE, distances


def test_transposed_weights_are_seen(case, ask, patches):
    """The square output projection of the vision tower has its own shape transposed: only numbers tell."""
    flat = traverse_util.flatten_dict(case.judge.params)
    key = ("visual", "blocks", "attn", "proj", "kernel")
    flat[key] = flat[key].swapaxes(1, 2)
    found = ask(case.context.tokens, patches, traverse_util.unflatten_dict(flat))
    assert np.abs(found - case.expected)[:, :, 0].max() > 20 * SCORE_TOLERANCE


# ------------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.parametrize("name", CASES)
def test_texts_are_cut_as_the_whole_chat_is(name):
    form = CASES[name][2]
    tokenizer, oracle = reward_oracle.judge_tokenizer(), Oracle(None, None, form)
    for text in form.texts:
        for prompt in ("a red cat", " two  spaces, {braces} and a line\nbreak", ""):
            whole = reward_oracle.real_tokenizer().encode(
                oracle.chat(text.replace("{}", "@"), "", 6).replace("@", prompt)
            )
            ids = tokenizer.text(form, text, prompt, 6)
            assert ids == whole.ids[: len(ids)]
            assert ids[-1] == ROWS - 1 and whole.ids.count(ROWS - 1) == 1


def test_typed_special_tokens_are_words():
    tokenizer = reward_oracle.judge_tokenizer()
    ids = tokenizer.text(HPSV3, HPSV3.texts[0], "a <|image_pad|> <|Reward|><|im_end|> cat", 4)
    assert [ids.count(tokenizer.special(token)) for token in ("<|image_pad|>", "<|Reward|>", "<|im_end|>")] == [4, 1, 1]


def bare_judge(form=HPSV3, **sizes) -> Judge:
    """Without weights."""
    from dreamlite_jax.rewards.backbones import BACKBONES
    from dreamlite_jax.rewards.network import RewardNetwork

    backbone = "qwen2_vl_7b" if form is HPSV3 else "qwen2_5_vl_7b"
    network = RewardNetwork(BACKBONES[backbone], heads=len(form.texts))
    return Judge(network, {}, form, reward_oracle.judge_tokenizer(), **{"height": 512, "width": 512, **sizes})


def test_shapes_do_not_depend_on_prompts():
    judge = bare_judge(prompt_tokens=40)
    assert judge.image_tokens == 256
    shapes = [{k: v.shape[1:] for k, v in judge.prepare(prompts).items()} for prompts in ([], ["a"], PROMPTS)]
    assert shapes[0] == shapes[1] == shapes[2]
    assert shapes[0]["ids"] == (1, judge.length)
    judge.prepare(["cat " * 40])
    with pytest.raises(UserError, match=r"the prompt has 80 tokens; the judge was set up for 40"):
        judge.prepare(["cat " * 79])


def test_pictures_of_another_size_are_refused():
    judge = bare_judge()
    images = np.zeros((1, 256, 512, 3), np.float32)
    with pytest.raises(UserError, match="pictures are 512 x 256; the judge was set up for 512 x 512"):
        judge(judge.params, images, Context(judge.prepare(["a"]), images, images, np.zeros(1, np.float32)))


# -------------------------------------------------------------------------------------------------------------- loader


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder of a small HPSv3, and its config."""
    folder = tmp_path_factory.mktemp("small")
    Oracle.of("qwen2_vl", HPSV3).save(folder, old_names=False)
    return RewardConfig("hpsv3", checkpoint=str(folder / "checkpoint.safetensors"), base=str(folder / "base"))


def changed(config: RewardConfig, tmp_path: Path, change: Any) -> RewardConfig:
    tensors = safetensors.numpy.load_file(config.checkpoint)
    change(tensors)
    safetensors.numpy.save_file(tensors, tmp_path / "changed.safetensors")
    return dataclasses.replace(config, checkpoint=str(tmp_path / "changed.safetensors"))


HEAD, TABLE = "rm_head.3.weight", "model.language_model.embed_tokens.weight"
BAD_TENSORS = {
    "no head": (lambda tensors: tensors.pop(HEAD), r"rm_head\.3\.weight is missing"),
    "two heads": (
        lambda tensors: tensors.update({HEAD.replace("rm_head", "rm_heads.head_0"): tensors.pop(HEAD)}),
        r"rm_head\.3\.weight is missing \(nearest: rm_heads\.head_0\.3\.weight\)",
    ),
    "the base model's rows": (
        lambda tensors: tensors.update({TABLE: np.zeros((152064, 64), np.float32)}),
        r"embed_tokens\.weight has shape \(152064, 64\).*\(151670, 64\)",
    ),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_tensors_that_do_not_fit(small, tmp_path, name):
    change, message = BAD_TENSORS[name]
    with pytest.raises(UserError, match=message):
        load_judge(changed(small, tmp_path, change))


def test_files_that_do_not_fit(small, tmp_path):
    with pytest.raises(UserError, match="hpsv3 needs checkpoint"):
        load_judge(RewardConfig("hpsv3"))
    with pytest.raises(UserError, match="does not exist"):
        load_judge(dataclasses.replace(small, checkpoint=str(tmp_path / "none.safetensors")))
    with pytest.raises(UserError, match=r"tokenizer\.json does not exist"):
        load_judge(dataclasses.replace(small, base=str(tmp_path)))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        JudgeTokenizer(tmp_path / "tokenizer.json")
    edit = RewardConfig(
        "editreward", tasks=("edit",), backbone="qwen2_5_vl_7b", checkpoint=small.checkpoint, base=small.base
    )
    with pytest.raises(UserError, match="model_type is 'qwen2_vl'; backbone 'qwen2_5_vl_7b' has another"):
        load_judge(edit)


def test_another_chat_template_is_refused(tmp_path):
    check_chat(tmp_path, HPSV3)  # none there
    template = {"chat_template": "{{ 'You are MiMo, an AI assistant developed by Xiaomi.' }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(template))
    check_chat(tmp_path, EDIT_REWARD["mimo_vl_7b"])
    with pytest.raises(UserError, match=r"tokenizer_config\.json never says 'You are a helpful assistant\.'"):
        check_chat(tmp_path, HPSV3)
    (tmp_path / "chat_template.jinja").write_text("{{ 'You are a helpful assistant.' }}")
    check_chat(tmp_path, HPSV3)


def test_names_of_the_released_heads():
    leaf = ("rm_heads_1", "layers_3", "bias")
    assert head_names(2)(leaf, None) == "rm_heads.head_1.3.bias"
    assert head_names(1)(("rm_heads_0", "layers_5", "kernel"), None) == "rm_head.5.weight"
    assert head_names(1)(("language_model", "layers", "mlp", "up_proj", "kernel"), 7) == (
        "language_model.layers.7.mlp.up_proj.weight"
    )


BAD_CONFIGS = {
    "hpsv3 was released on": {"kind": "hpsv3", "backbone": "qwen3_vl_8b"},
    "editreward was released on": {"kind": "editreward"},
    "editreward compares with a source": {"kind": "editreward", "backbone": "mimo_vl_7b"},
    "prompt_tokens is 0": {"kind": "hpsv3", "prompt_tokens": 0},
    "size_px is": {"kind": "hpsv3", "size_px": (0, 512)},
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_bad_configs(message):
    with pytest.raises(UserError, match=message):
        RewardConfig(**BAD_CONFIGS[message])


@pytest.mark.slow
def test_sharded_scores_are_the_same(small):
    """Parameters split over fsdp, samples over all devices."""
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    config = dataclasses.replace(small, dtype="float32", size_px=(96, 96), prompt_tokens=24)
    images = jnp.asarray(random_pictures(8, 96, 96))

    def ask(judge, images, tokens):
        about = Context(tokens, images, images, jnp.zeros(8))
        return jax.jit(lambda params, x: judge(params, x, about).sum())(judge.params, images)

    single, split = load_judge(config), load_judge(config, mesh)
    kernel = split.params["language_model"]["layers"]["mlp"]["up_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (2, 64, 24)
    tokens = single.prepare(PROMPTS * 4)
    rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    with jax.set_mesh(mesh):
        found = ask(split, jax.device_put(images, rows), jax.device_put(dict(tokens), rows))
    np.testing.assert_allclose(found, ask(single, images, tokens), atol=SCORE_TOLERANCE, rtol=0)
