"""The released pipeline's prompt encoding with random weights, and its folders."""

import pytest
import released_folder
from qwen_oracle import tokenizer_files

from dreamlite_jax.models.qwen_vl.load import read_config
from dreamlite_jax.text.qwen_inputs import QwenTokenizer


@pytest.fixture(scope="session")
def pipeline():
    """The oracle: diffusers' pipeline with a small random text encoder and no U-Net or VAE."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_files())
    return diffusers.DreamLitePipeline(
        text_encoder=released_folder.text_encoder(),
        tokenizer=tokenizer,
        processor=released_folder.processor(tokenizer),
        vae=None,
        unet=None,
        scheduler=None,
    )


@pytest.fixture(scope="session")
def folder(pipeline, tmp_path_factory):
    """The three folders of a released pipeline that the encoder reads."""
    path = tmp_path_factory.mktemp("dreamlite")
    pipeline.text_encoder.save_pretrained(path / "text_encoder")
    pipeline.tokenizer.save_pretrained(path / "tokenizer")
    pipeline.processor.image_processor.save_pretrained(path / "processor")
    return path


@pytest.fixture(scope="session")
def config(folder):
    """Of the text encoder."""
    return read_config(folder / "text_encoder")


@pytest.fixture(scope="session")
def tokenizer(config):
    return QwenTokenizer(tokenizer_files() / "tokenizer.json", config)
