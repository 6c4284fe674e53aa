"""Templates, tokenizer, the MiniLM prompt encoder and the cache."""

import ast
import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dreamlite_jax.errors import UserError
from dreamlite_jax.models import minilm
from dreamlite_jax.text import templates
from dreamlite_jax.text.cache import CachedEncoder, image_sha256
from dreamlite_jax.text.encoder import PromptEncoder, PromptRequest, bucket_length, checked_buckets, stack_states
from dreamlite_jax.text.minilm_encoder import MiniLMEncoder
from dreamlite_jax.text.tokenizers import MiniLMTokenizer

PROMPTS = (
    PromptRequest("generate", "a red circle left of a small blue square"),
    PromptRequest("null", ""),
    PromptRequest("edit", "the red circle painted green"),
    PromptRequest("generate", "two stars"),
    PromptRequest("edit", "the large yellow triangle in the upper left corner moved to the lower right corner"),
)


@pytest.fixture(scope="module")
def encoder():
    return MiniLMEncoder(chunk=4)


@pytest.fixture(scope="module")
def tokenizer():
    return MiniLMTokenizer()


# ---------------------------------------------------------------------------------------------------- templates


def released_pipeline() -> ast.Module:
    """The syntax tree of the released pipeline; reading it does not import diffusers or torch."""
    spec = importlib.util.find_spec("diffusers")
    if spec is None:
        pytest.skip("diffusers is not installed")
    path = Path(spec.submodule_search_locations[0]) / "pipelines" / "dreamlite" / "pipeline_dreamlite.py"
    return ast.parse(path.read_text())


def released_constant(name: str):
    for node in ast.walk(released_pipeline()):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute) and node.targets[0].attr == name:
            return ast.literal_eval(node.value)
    raise AssertionError(f"the released pipeline has no {name}")


@pytest.mark.parametrize(
    ("chat", "name"),
    [
        (templates.GENERATE_CHAT, "prompt_template_encode_generate"),
        (templates.EDIT_CHAT, "prompt_template_encode_edit"),
    ],
)
def test_chat_templates_are_the_released_ones(chat, name):
    assert chat.text == released_constant(name)
    assert chat.dropped_tokens == released_constant(name + "_start_idx")


def test_user_texts_are_the_released_ones():
    assigned = [
        eval(compile(ast.Expression(node.value), "released", "eval"), {"prompt": "a cat"})
        for node in ast.walk(released_pipeline())
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id == "prompt_str"
        and isinstance(node.value, ast.JoinedStr)
    ]
    assert sorted(assigned) == sorted(templates.user_text(task, "a cat") for task in ("generate", "edit"))


def test_null_is_empty_and_prompts_are_stripped():
    assert templates.user_text("null", "") == ""
    assert templates.user_text("null", " \n") == ""
    assert templates.user_text("generate", "\n a cat \n") == "[Generate]: a cat"
    assert PromptRequest("edit", "\na hat").text == "a hat"
    assert PromptRequest("edit", "\na hat").user_text.endswith("the left one has a hat")


@pytest.mark.parametrize(
    ("task", "prompt", "message"),
    [
        ("generate", "", "prompt is empty"),
        ("edit", " \n\t", "prompt is empty"),
        ("null", "a cat", "'a cat'; a null prompt is the empty string"),
        ("draw", "a cat", "task is 'draw'; it must be one of generate, edit, null"),
        ("generate", None, "prompt is None, a NoneType; it must be text"),
    ],
)
def test_bad_prompts_are_refused(task, prompt, message):
    with pytest.raises(UserError, match=message):
        templates.clean_prompt(task, prompt)


def test_requests_and_user_texts_check_their_prompt():
    for build in (PromptRequest, templates.user_text):
        with pytest.raises(UserError, match="prompt is empty"):
            build("edit", " ")
        with pytest.raises(UserError, match="a null prompt is the empty string"):
            build("null", "a cat")


def test_generate_takes_no_image():
    with pytest.raises(UserError, match="generate takes no image"):
        PromptRequest("generate", "a cat", Image.new("RGB", (8, 8)))


# ------------------------------------------------------------------------------------------- buckets and padding


def test_bucket_length_is_the_smallest_that_fits():
    buckets = (16, 32, 48)
    for count in range(49):
        assert bucket_length(count, buckets) == min(b for b in buckets if b >= count)
    with pytest.raises(UserError, match="49 tokens and the limit is 48"):
        bucket_length(49, buckets)


@pytest.mark.parametrize("buckets", [(), (0, 16), (16, 16), (32, 16)])
def test_bad_buckets_are_refused(buckets):
    with pytest.raises(UserError, match="positive and ascending"):
        checked_buckets(buckets)


def test_stack_states_pads_with_zeros():
    rows = [np.full((3, 2), 7.0, np.float32), np.full((5, 2), 8.0, np.float32)]
    states, mask = stack_states(rows, 2, (4, 8))
    assert states.shape == (2, 8, 2)
    assert mask.sum(axis=1).tolist() == [3, 5]
    np.testing.assert_array_equal(states[..., 0], mask * np.array([[7.0], [8.0]], np.float32))
    assert stack_states(rows, 2, (4, 8), length=5).states.shape == (2, 5, 2)
    with pytest.raises(UserError, match="5 tokens and the limit is 4"):
        stack_states(rows, 2, (4, 8), length=4)
    with pytest.raises(UserError, match="length is 0"):
        stack_states([], 2, (4, 8), length=0)


# ---------------------------------------------------------------------------------------------------- tokenizer


def test_tokens_equal_transformers(tokenizer):
    transformers = pytest.importorskip("transformers")
    texts = [request.user_text for request in PROMPTS] + ["Ünïcode Café — 猫 on a mat…", "word " * 200, "x" * 150]
    oracle = transformers.AutoTokenizer.from_pretrained(minilm.minilm_directory())
    assert tokenizer.token_ids(texts) == [oracle(text)["input_ids"] for text in texts]


def test_special_tokens_in_a_prompt_are_plain_text(tokenizer):
    (ids,) = tokenizer.token_ids(["a [SEP] b [PAD] [MASK]"])
    assert (ids[0], ids[-1]) == (101, 102)
    assert not {0, 100, 101, 102, 103} & set(ids[1:-1])


def test_padding_of_tokens(tokenizer):
    token_ids, mask = tokenizer.pad([[101, 5, 102], [101, 102]], length=4, rows=3)
    assert token_ids.dtype == np.int32
    assert mask.dtype == np.float32
    assert token_ids.tolist() == [[101, 5, 102, 0], [101, 102, 0, 0], [0, 0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
    with pytest.raises(UserError, match="3 tokens and the limit is 2"):
        tokenizer.pad([[101, 5, 102]], length=2)
    with pytest.raises(UserError, match="2 texts do not fit into 1 rows"):
        tokenizer.pad([[101], [102]], length=2, rows=1)


# ------------------------------------------------------------------------------------------------ prompt encoder


def test_encoder_agrees_with_the_model(encoder):
    """Bucketing, chunking and reordering change nothing: every row is the model's answer to that prompt alone."""
    config, params = minilm.load_minilm()
    states, mask = encoder.encode(PROMPTS)
    assert isinstance(encoder, PromptEncoder)
    assert states.shape == (5, 48, encoder.hidden_dim)
    assert states.dtype == mask.dtype == np.float32
    for i, request in enumerate(PROMPTS):
        (ids,) = encoder.tokenizer.token_ids([request.user_text])
        assert mask[i].sum() == len(ids)
        assert mask[i, : len(ids)].all()
        alone = minilm.MiniLM(config).apply({"params": params}, jnp.array([ids]), jnp.ones((1, len(ids))))
        np.testing.assert_allclose(states[i, : len(ids)], alone[0], atol=2e-5, rtol=0)
        assert not states[i, len(ids) :].any()


def test_states_do_not_depend_on_the_rest_of_the_batch(encoder):
    together = encoder.encode(PROMPTS, length=64).states
    backwards = encoder.encode(PROMPTS[::-1] * 3, length=64).states
    for i, request in enumerate(PROMPTS):
        np.testing.assert_array_equal(together[i], encoder.encode([request], length=64).states[0])
        for copy in backwards[len(PROMPTS) - 1 - i :: len(PROMPTS)]:
            np.testing.assert_array_equal(together[i], copy)


def test_length_is_a_bucket_or_as_asked(encoder):
    assert encoder.encode([PROMPTS[1]]).states.shape == (1, 16, 384)
    assert encoder.encode([PROMPTS[1], PROMPTS[2]]).states.shape == (2, 48, 384)
    assert encoder.encode([PROMPTS[1]], length=77).mask.shape == (1, 77)
    assert encoder.encode([]).states.shape == (0, 16, 384)


def test_compiles_once_per_bucket(encoder):
    for words in range(1, 50):
        encoder.encode([PromptRequest("generate", "cat " * words)] * (words % 3 + 1))
    assert encoder._states._cache_size() <= len(encoder.buckets)


def test_prompts_too_long_are_refused(encoder):
    # 4 tokens of the tag "[ generate ] :" and [CLS], [SEP]
    with pytest.raises(UserError, match="65 tokens and the limit is 64: '\\[Generate\\]: cat cat"):
        encoder.encode([PROMPTS[0], PromptRequest("generate", "cat " * 59)])
    assert encoder.encode([PromptRequest("generate", "cat " * 58)]).mask.sum() == 64
    with pytest.raises(UserError, match="8 tokens and the limit is 7"):
        encoder.encode([PROMPTS[3]], length=7)


def test_image_of_an_edit_is_not_looked_at(encoder):
    picture = Image.new("RGB", (8, 8), "red")
    with_image = encoder.encode([PromptRequest("edit", "a hat", picture)])
    np.testing.assert_array_equal(with_image.states, encoder.encode([PromptRequest("edit", "a hat")]).states)


def test_task_and_words_change_the_states(encoder):
    """Against an encoder that answers the same to everything."""
    a, b, c = encoder.encode(
        [
            PromptRequest("generate", "two stars"),
            PromptRequest("generate", "two moons"),
            PromptRequest("edit", "two stars"),
        ]
    ).states
    assert np.abs(a - b).max() > 0.1
    assert np.abs(a - c).max() > 0.1


def test_own_params_and_lengths():
    config = minilm.read_config()
    zeros = jax.tree.map(np.zeros_like, minilm.load_minilm()[1])
    small = MiniLMEncoder(zeros, max_length=24, chunk=1)
    assert small.buckets == (16, 24)
    assert not small.encode([PROMPTS[0]]).states.any()
    for wrong in ({"max_length": config.max_position_embeddings + 1}, {"buckets": (32, 16)}, {"chunk": 0}):
        with pytest.raises(UserError):
            MiniLMEncoder(zeros, **wrong)


# -------------------------------------------------------------------------------------------------------- cache


class Counting:
    """Passes everything on to an encoder and writes down what it was asked."""

    def __init__(self, encoder):
        self.encoder, self.hidden_dim, self.buckets = encoder, encoder.hidden_dim, encoder.buckets
        self.null_tail = encoder.null_tail
        self.asked = []

    def encode(self, requests, length=None):
        self.asked.append([(request.task, request.text) for request in requests])
        return self.encoder.encode(requests, length)


def assert_same(first, second):
    np.testing.assert_array_equal(first.states, second.states)
    np.testing.assert_array_equal(first.mask, second.mask)


def test_cache_gives_the_same_bits_and_asks_once(encoder):
    counting = Counting(encoder)
    cached = CachedEncoder(counting)
    assert isinstance(cached, PromptEncoder)
    batches = [PROMPTS[:2], PROMPTS, PROMPTS[::-1] + PROMPTS, [PROMPTS[1]], []]
    for batch in batches:
        for length in (None, 64):
            assert_same(cached.encode(batch, length), encoder.encode(batch, length))
    asked = [prompt for call in counting.asked for prompt in call]
    assert sorted(asked) == sorted((request.task, request.text) for request in PROMPTS)
    assert len(counting.asked) == 2


def test_cache_is_safe_from_what_callers_do_to_the_arrays(encoder):
    cached = CachedEncoder(encoder)
    cached.encode(PROMPTS).states[:] = 0
    assert_same(cached.encode(PROMPTS), encoder.encode(PROMPTS))


def test_cache_forgets_the_least_recently_used(encoder):
    counting = Counting(encoder)
    cached = CachedEncoder(counting, capacity=2)
    null, short = PROMPTS[1], PROMPTS[3]
    cached.encode([null, short])
    cached.encode([null])  # short is now the older one
    cached.encode([PROMPTS[0]])
    assert len(cached) == 2
    cached.encode([null])
    assert len(counting.asked) == 2
    cached.encode([short])
    assert len(counting.asked) == 3
    assert_same(cached.encode(PROMPTS), encoder.encode(PROMPTS))  # a batch larger than the cache
    assert len(cached) == 2


def test_cache_refuses_as_the_encoder_does(encoder):
    cached = CachedEncoder(encoder)
    for _ in range(2):
        with pytest.raises(UserError, match="8 tokens and the limit is 7"):
            cached.encode([PROMPTS[3]], length=7)
        cached.encode([PROMPTS[3]])
    with pytest.raises(UserError, match="capacity is 0"):
        CachedEncoder(encoder, capacity=0)


def test_cache_tells_pictures_apart(encoder):
    red, green = (Image.new("RGB", (8, 8), colour) for colour in ("red", "green"))
    requests = [PromptRequest("edit", "a hat", image) for image in (red, green, red.copy(), None)]
    for image_in_key, distinct in ((True, 3), (False, 1)):
        counting = Counting(encoder)
        CachedEncoder(counting, image_in_key=image_in_key).encode(requests)
        assert len(counting.asked[0]) == distinct


def test_image_digest_sees_pixels_size_and_mode():
    image = Image.new("RGB", (8, 4))
    other = [Image.new("RGB", (4, 8)), Image.new("L", (8, 12)), Image.new("RGB", (8, 4), "blue")]
    assert image_sha256(image) == image_sha256(image.copy())
    assert len({image_sha256(i) for i in [image, *other, None]}) == 5
