"""Folders of latents whose text states come from different encoders are told apart, whatever their order."""

import dataclasses
import itertools

import numpy as np
import pytest
import tiny

from dreamlite_jax.config import TextConfig
from dreamlite_jax.data.config import SourceConfig
from dreamlite_jax.data.encoders import check_encoders, text_identity
from dreamlite_jax.errors import UserError

NULL = np.random.default_rng(0).normal(size=(2, tiny.TEXT_DIM))


def info(width=tiny.TEXT_DIM, null=NULL, sha256="a" * 64, **text):
    found = {"null_states": np.asarray(null)[:, :width].tolist()}
    return found | {"text": {"encoder": "minilm", "sha256": sha256} | text}


def old(null=NULL, **text):
    """Of a folder of an older version."""
    return (
        {"null_states": np.asarray(null).tolist(), "config": {"text": text}} if text else {"null_states": null.tolist()}
    )


def check(*infos, text=None):
    model = dataclasses.replace(tiny.CONFIG, text=text or TextConfig())
    check_encoders([SourceConfig(f"folder_{i}") for i in range(len(infos))], infos, model)


def test_folders_of_one_encoder_pass():
    rounded = NULL * (1 + 1e-3 * np.random.default_rng(1).normal(size=NULL.shape))
    check(info(), info(null=rounded), old(), old(null=rounded, encoder="minilm", sha256=""))
    check(old(), old(null=rounded))
    check(info(), text=TextConfig(sha256="a" * 64))


ODD = {
    "weights": (info(sha256="b" * 64), "sha256 bbbbbbbbbbbb…"),
    "kind": (info(encoder="qwen3_vl", sha256="c" * 64), "encoder qwen3_vl, config.model.text has encoder minilm"),
    "old kind": (old(encoder="qwen3_vl"), "encoder qwen3_vl"),
    "old, another empty prompt": (old(null=-NULL), "those of the empty prompt are not those of"),
    "old, a longer empty prompt": (old(null=np.repeat(NULL, 2, 0)), "those of the empty prompt"),
    "width": (info(width=48, sha256="a" * 64), "text states of width 48: those of folder_"),
}


@pytest.mark.parametrize("odd", ODD)
def test_the_odd_folder_is_named_in_one_line(odd):
    other, says = ODD[odd]
    for order in itertools.permutations([info(), info(), other]):
        with pytest.raises(UserError, match=says) as caught:
            check(*order)
        assert "\n" not in str(caught.value)
    place = [info(), info(), other].index(other)
    with pytest.raises(UserError, match=f"folder_{place}"):
        check(info(), info(), other)


def test_the_config_counts_too():
    with pytest.raises(UserError, match=r"folder_0 holds .* encoder: sha256 aaaaaaaaaaaa…, config.model.text has"):
        check(info(), text=TextConfig(sha256="b" * 64))


def test_an_identity_is_all_that_states_depend_on():
    one, other = TextConfig(), TextConfig(max_length=16)
    assert text_identity(one, "x") == text_identity(other, "x") != text_identity(one, "y")
