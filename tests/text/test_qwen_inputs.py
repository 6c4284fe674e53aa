"""What Qwen3-VL reads, against the Hugging Face tokenizer and processor: token ids of chats, patches of pictures."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from qwen_oracle import tokenizer_files
from released_folder import picture

from dreamlite_jax.errors import UserError
from dreamlite_jax.text.qwen_encoder import QwenEncoder
from dreamlite_jax.text.qwen_inputs import PictureInputs, QwenTokenizer, read_picture_inputs
from dreamlite_jax.text.templates import EDIT_CHAT, GENERATE_CHAT, user_text

PROMPT = "a red fox on a frozen lake, 4k — 雪の中, late   light\nand a sign that says “don't”"
LONGER = "a small wooden boat under the arches of an old bridge at dusk, " * 6

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
    mapping = json.loads((tokenizer_files() / "tokenizer.json").read_text("utf-8"))
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
    shutil.copy(tokenizer_files() / "tokenizer.json", tmp_path / "bare")
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
    "do_normalize is False; it must be True": {"do_normalize": False},
}


@pytest.mark.parametrize("message", BAD_SETTINGS)
def test_other_settings_are_refused(folder, config, tmp_path, message):
    settings = json.loads((folder / "processor" / "preprocessor_config.json").read_text())
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**settings, **BAD_SETTINGS[message]}))
    with pytest.raises(UserError, match=message):
        read_picture_inputs(path, config.vision)


def test_patches_that_the_source_does_not_divide_into_are_refused(folder, config, tmp_path):
    settings = json.loads((folder / "processor" / "preprocessor_config.json").read_text())
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**settings, "patch_size": 14}))
    with pytest.raises(UserError, match=r"would resize a source of 512 pixels a side to a multiple of .* 28"):
        read_picture_inputs(path, dataclasses.replace(config.vision, patch_size=14))
