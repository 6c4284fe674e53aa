"""The Qwen3-VL prompt encoder against the released pipeline's own prompt encoding, on random weights."""

import dataclasses
import hashlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from PIL import Image
from released_folder import picture

from dreamlite_jax.config import TextConfig
from dreamlite_jax.errors import UserError
from dreamlite_jax.models.qwen_vl.load import weight_files
from dreamlite_jax.text.cache import CachedEncoder
from dreamlite_jax.text.encoder import PromptEncoder, PromptRequest
from dreamlite_jax.text.load import load_encoder
from dreamlite_jax.text.qwen_encoder import GENERATE_TOKENS, QwenEncoder
from dreamlite_jax.text.templates import user_text

TOLERANCE = 5e-5  # largest absolute difference of a state; states are of order 1
PICTURE_STATES = 256 + 2  # of a 512 px source, with vision_start and vision_end
CLOSING = 5  # tokens of the template after the words


@pytest.fixture(scope="module")
def encoder(folder):
    return QwenEncoder.load(folder, dtype=jnp.float32)


def oracle_rows(pipeline, mode: str, texts, image=None) -> list[np.ndarray]:
    """The states of each text without their padding, as the pipeline's __call__ asks for them."""
    import torch

    limit = {} if mode == "edit" else {"max_sequence_length": GENERATE_TOKENS}
    with torch.no_grad():
        states, mask = pipeline.encode_prompt(mode, texts, "cpu", torch.float32, image=image, **limit)
    return [row[: int(kept.sum())].numpy() for row, kept in zip(states, mask, strict=True)]


def difference(encoded, expected) -> float:
    """The parity check itself: masks equal, padding zero, and the largest difference of the states."""
    counts = [len(row) for row in expected]
    np.testing.assert_array_equal(encoded.mask, np.arange(encoded.mask.shape[1]) < np.array(counts)[:, None])
    assert encoded.states.dtype == encoded.mask.dtype == np.float32
    assert not encoded.states[encoded.mask == 0].any()
    pairs = zip(encoded.states, expected, strict=True)
    return max(float(np.abs(states[: len(row)] - row).max()) for states, row in pairs)


PROMPT = "a red fox on a frozen lake, 4k — 雪の中, late   light\nand a sign that says “don't”"
LONGER = "a small wooden boat under the arches of an old bridge at dusk, " * 6


# ------------------------------------------------------------------------------------------- against the pipeline


@pytest.fixture(scope="module")
def generate_rows(pipeline):
    """As the base pipeline: the empty negative prompt and the prompt; here with a longer one."""
    return oracle_rows(pipeline, "generate", ["", *(user_text("generate", text) for text in (PROMPT, LONGER))])


@pytest.fixture(scope="module")
def edit_rows(pipeline):
    """As the base pipeline: two empty negative prompts and the instruction, all with the source."""
    return oracle_rows(pipeline, "edit", ["", "", user_text("edit", PROMPT)], picture())


def test_generate_equals_the_pipeline(encoder, generate_rows):
    requests = [PromptRequest("null", ""), PromptRequest("generate", PROMPT), PromptRequest("generate", LONGER)]
    encoded = encoder.encode(requests)
    assert encoded.states.shape == (3, 128, 48)
    assert difference(encoded, generate_rows) <= TOLERANCE


def test_edit_equals_the_pipeline(encoder, edit_rows):
    null = PromptRequest("null", "", picture())
    encoded = encoder.encode([null, null, PromptRequest("edit", PROMPT, picture())])
    assert encoded.states.shape == (3, 384, 48)
    assert [len(row) for row in edit_rows[:2]] == [PICTURE_STATES + CLOSING] * 2
    assert difference(encoded, edit_rows) <= TOLERANCE


def test_mixed_batch_equals_the_pipeline(pipeline, encoder, generate_rows, edit_rows):
    """Tasks, pictures and lengths mixed, more rows than a chunk, in an order that interleaves them."""
    other = picture(640, 480, "RGBA", seed=3)
    [expected_other] = oracle_rows(pipeline, "edit", [user_text("edit", "a blue door")], other)
    requests = [
        PromptRequest("edit", PROMPT, picture()),
        PromptRequest("generate", LONGER),
        PromptRequest("null", "", picture()),
        PromptRequest("generate", PROMPT),
        PromptRequest("edit", "a blue door", other),
        PromptRequest("null", ""),
    ]
    expected = [edit_rows[2], generate_rows[2], edit_rows[0], generate_rows[1], expected_other, generate_rows[0]]
    small = QwenEncoder(encoder._model, encoder._params, encoder._tokenizer, encoder._pictures, chunk=2)
    encoded = small.encode(requests, length=400)
    assert encoded.states.shape == (6, 400, 48)
    assert difference(encoded, expected) <= TOLERANCE


def test_the_check_catches_wrong_inputs(encoder, generate_rows, edit_rows):
    assert difference(encoder.encode([PromptRequest("null", "", picture(seed=5))]), edit_rows[:1]) > 20 * TOLERANCE
    edit = encoder.encode([PromptRequest("null", "", picture())])
    flipped = picture().transpose(Image.Transpose.TRANSPOSE)
    assert difference(encoder.encode([PromptRequest("null", "", flipped)]), edit_rows[:1]) > 20 * TOLERANCE
    assert difference(edit, edit_rows[:1]) <= TOLERANCE
    with pytest.raises(AssertionError):  # another number of tokens
        difference(encoder.encode([PromptRequest("generate", PROMPT)]), generate_rows[2:])


# ------------------------------------------------------------------------------------------------------------- limits


def words(tokenizer, task: str, count: int) -> str:
    """A prompt that is `count` tokens with its tag."""
    text = "boat"
    while len(tokenizer.words(user_text(task, text))) < count:
        text += " boat"
    return text


@pytest.mark.parametrize("count", [195, 198, 200])
def test_longest_prompts_equal_the_pipeline(pipeline, encoder, tokenizer, count):
    """From 196 tokens on the pipeline cuts into the closing words of its template, and so do we."""
    text = words(tokenizer, "generate", count)
    expected = oracle_rows(pipeline, "generate", [user_text("generate", text)])
    assert len(expected[0]) == GENERATE_TOKENS
    assert difference(encoder.encode([PromptRequest("generate", text)]), expected) <= TOLERANCE


def test_prompts_beyond_the_limit_are_refused(encoder, tokenizer):
    with pytest.raises(UserError, match=r"has 201 tokens and the limit is 200: .*shorten it"):
        encoder.encode([PromptRequest("generate", words(tokenizer, "generate", 201))])
    most = encoder.buckets[-1] - PICTURE_STATES - CLOSING
    assert most == 249
    encoder.encode([PromptRequest("edit", words(tokenizer, "edit", most), picture())])
    with pytest.raises(UserError, match="has 250 tokens and the limit is 249"):
        encoder.encode([PromptRequest("edit", words(tokenizer, "edit", most + 1), picture())])
    with pytest.raises(UserError, match="the limit is 15"):
        encoder.encode([PromptRequest("generate", words(tokenizer, "generate", 16))], length=20)


def test_edit_without_a_picture_is_refused(encoder):
    with pytest.raises(UserError, match="task edit needs an image"):
        encoder.encode([PromptRequest("edit", "a blue door")])


def test_a_config_sets_the_limit_and_pins_the_weights(folder):
    """As `load_model` loads it; 263 of the states are picture and template."""
    [file] = weight_files(folder / "text_encoder")
    pinned = TextConfig("qwen3_vl", ".", hashlib.sha256(file.read_bytes()).hexdigest(), max_length=300)
    assert load_encoder(pinned, folder).buckets == (64, 128, 200, 300)
    other = dataclasses.replace(pinned, sha256="0" * 64)
    with pytest.raises(UserError, match=r"text.sha256: .*; install the version it names"):
        load_encoder(other, folder)


def test_bad_options_are_refused(encoder):
    parts = (encoder._model, encoder._params, encoder._tokenizer, encoder._pictures)
    with pytest.raises(UserError, match="chunk is 6"):
        QwenEncoder(*parts, chunk=6)
    with pytest.raises(UserError, match="positive and ascending"):
        QwenEncoder(*parts, buckets=(64, 64))


# ----------------------------------------------------------------------------------------------------------- protocol


def test_a_new_length_does_not_recompile(encoder):
    fresh = QwenEncoder(encoder._model, encoder._params, encoder._tokenizer, encoder._pictures)
    for count in (1, 9, 30):
        fresh.encode([PromptRequest("generate", "boat " * count)])
    assert fresh._states._cache_size() == 1
    fresh.encode([PromptRequest("generate", "boat " * 80)])
    assert fresh._states._cache_size() == 2


def test_it_is_a_prompt_encoder_and_can_be_cached(encoder):
    assert isinstance(encoder, PromptEncoder)
    cached = CachedEncoder(encoder)
    requests = [PromptRequest("null", ""), PromptRequest("generate", PROMPT)]
    for _ in range(2):
        for got, expected in zip(cached.encode(requests), encoder.encode(requests), strict=True):
            np.testing.assert_allclose(got, expected, atol=1e-5)
    assert len(cached) == 2


def test_no_requests(encoder):
    encoded = encoder.encode([])
    assert encoded.states.shape == (0, encoder.buckets[0], 48)


def test_torch_is_not_imported():
    code = (
        "import sys, dreamlite_jax.text.qwen_encoder; print({'torch', 'transformers', 'tensorflow'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_encoder_on_a_mesh_is_the_same(folder, encoder):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:8])
    sharded = QwenEncoder.load(folder, dtype=jnp.float32, mesh=mesh)
    requests = [PromptRequest("generate", PROMPT), PromptRequest("edit", PROMPT, picture()), PromptRequest("null", "")]
    for got, expected in zip(sharded.encode(requests), encoder.encode(requests), strict=True):
        np.testing.assert_allclose(got, expected, atol=TOLERANCE)
