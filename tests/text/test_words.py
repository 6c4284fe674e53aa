"""Prompts of which nothing, or not all, can be read."""

import re

import pytest
import tokenizers

from dreamlite_jax.config import TextConfig
from dreamlite_jax.errors import UserError
from dreamlite_jax.text import load, templates, words

SURROGATE, BYTE = "\ud83d", "\udce9"  # half of an emoji; what a terminal's Latin-1 é becomes


@pytest.fixture(scope="module")
def read():
    return lambda prompt: load.unread(TextConfig(), prompt)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (f"a red caf{BYTE}", r"prompt is 'a red caf\\udce9'; its character 10 is no text"),
        (f"{SURROGATE} on a hill", "its character 1 is no text"),
        ("a cat\0", r"'a cat\\x00'; its character 6 is NUL"),
        ("\u200b", r"prompt is '\\u200b', of which nothing can be seen"),
        ("\ufeff\u00ad \u2060", "nothing can be seen"),  # a byte order mark, a soft hyphen, a word joiner
        ("\u3164\u115f", "nothing can be seen"),  # Hangul fillers, which count as letters
        ("\u0301\ufe0f", "nothing can be seen"),  # marks without a letter to stand on
        ("\x07\x1b", "nothing can be seen"),
        ("\ue000", "nothing can be seen"),  # private use
    ],
)
def test_what_is_no_text_is_refused(prompt, says):
    for task in ("generate", "edit"):
        with pytest.raises(UserError, match=says):
            templates.clean_prompt(task, prompt)


@pytest.mark.parametrize("prompt", ["!", "7", "é", "cafe\u0301", "👩\u200d🚀", "猫", "a\u200bb", "$"])
def test_what_can_be_seen_is_a_prompt(prompt):
    assert templates.clean_prompt("generate", f" {prompt}\n") == prompt


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("a 🚗 on a hill", "the text encoder does not know '🚗', so the picture is drawn without; write it in English"),
        ("一辆红色的汽车", "does not know '辆', '红', '色', '汽', '车', so"),
        ("a 漢字 car 字", "does not know '字', so"),
        ("a cat and " + "x" * 101, "does not know 'xxxxxxxxxxxxxxxxxxxxxxx…', so"),
        ("красная car", "has only the letters of 'красная', not the meaning; write it in English"),
        ("りんご 🍎 σκύλος", "does not know '🍎', so .*, and has only the letters of 'りんご', 'σκύλος', not the"),
        (" ".join(f"{chr(0x1F400 + i)} a" for i in range(9)), "'🐅' and 3 more, so"),
    ],
)
def test_words_without_a_token_are_said(read, prompt, says):
    assert re.search(says, read(prompt))


@pytest.mark.parametrize("prompt", ["🚗", "🚗!", "🍎🍏, 🍐", "x" * 101, "龘"])
def test_a_prompt_of_which_no_word_is_left_is_refused(read, prompt):
    with pytest.raises(UserError, match="knows none of the prompt's words: '"):
        read(prompt)


@pytest.mark.parametrize("prompt", ["a red car", "CAFÉ crème, 7 ducks", "[UNK] [SEP]", "!!!", "2 × α", "的"])
def test_of_other_prompts_nothing_is_said(read, prompt):
    assert read(prompt) == ""


def test_a_tokenizer_of_bytes_reads_everything():
    alphabet = {token: i for i, token in enumerate(tokenizers.pre_tokenizers.ByteLevel.alphabet())}
    reader = tokenizers.Tokenizer(tokenizers.models.BPE(alphabet, []))
    reader.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    assert reader.encode("🚗").tokens and words.unread(reader, "🚗 一") == ""
    assert load.unread(TextConfig(encoder="qwen3_vl"), "🚗") == ""
