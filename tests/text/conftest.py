"""The released pipeline's prompt encoding with random weights, and its folders."""

import pytest
import released_folder
from qwen_oracle import tokenizer_files

from dreamlite_jax.models.qwen_vl.load import read_config
from dreamlite_jax.text.qwen_inputs import QwenTokenizer


@pytest.fixture(scope="session")
def pipeline():
    """The oracle: diffusers' pipeline under a transformers that gives what the released weights were trained on."""
    return released_folder.prompt_pipeline()


@pytest.fixture(scope="session")
def folder(pipeline, tmp_path_factory):
    """The three folders of a released pipeline that the encoder reads."""
    return released_folder.write_prompt_parts(pipeline, tmp_path_factory.mktemp("dreamlite"))


@pytest.fixture(scope="session")
def config(folder):
    """Of the text encoder."""
    return read_config(folder / "text_encoder")


@pytest.fixture(scope="session")
def tokenizer(config):
    return QwenTokenizer(tokenizer_files() / "tokenizer.json", config)
