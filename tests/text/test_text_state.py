"""Which state of Qwen3-VL the U-Net reads: what two versions of transformers make of the pipeline's own encoding."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import older_transformers
import pytest
from released_folder import RECORD, WORDS, picture

from dreamlite_jax.config import TextConfig, check_text_state, from_dict, to_dict, with_text_state
from dreamlite_jax.errors import UserError
from dreamlite_jax.text.encoder import PromptRequest
from dreamlite_jax.text.load import load_encoder

TOLERANCE = 2e-5  # largest difference of a state over the largest state
STATES = ("before_norm", "after_norm")
TEXT = TextConfig("qwen3_vl", ".", max_length=512)


def recorded(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / RECORD) as file:
        return dict(file)


def difference(folder: Path, mode: str, state: str) -> float:
    """Largest difference of our states of this choice from what the pipeline made, over the largest there."""
    image = picture() if mode == "edit" else None
    encoder = load_encoder(dataclasses.replace(TEXT, state=state), folder, dtype=jnp.float32)
    states, mask = encoder.encode([PromptRequest("null", "", image), PromptRequest(mode, WORDS, image)])
    rows = [recorded(folder)[f"{mode}_{i}"] for i in range(2)]
    assert mask.sum(1).tolist() == [len(row) for row in rows]
    return max(float(np.abs(a[: len(b)] - b).max() / np.abs(b).max()) for a, b in zip(states, rows, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("version, meant", [("4.57.3", "before_norm"), ("", "after_norm")])
def test_the_pipeline_itself_under_two_versions_of_transformers(version, meant, tmp_path):
    """The released pipeline, unchanged, in a process of its own; without a version: the installed transformers 5."""
    older = older_transformers.install(version, tmp_path / "older", older_transformers.DIFFUSERS) if version else None
    code = "import sys, pathlib, released_folder; released_folder.record_states(pathlib.Path(sys.argv[1]))"
    folder = tmp_path / "released"
    folder.mkdir()
    older_transformers.run(code, str(folder), older=older)
    found = recorded(folder)
    assert str(found["version"]).startswith(version or "5.")
    other = next(state for state in STATES if state != meant)
    for mode in ("generate", "edit"):
        distances = {state: float(found[f"{mode}_{state}"]) for state in STATES}
        ours = {state: difference(folder, mode, state) for state in STATES}
        print(
            f"transformers {found['version']} {mode:<8}: hidden_states[-1] from the norm's input "
            f"{distances['before_norm']:.1e}, output {distances['after_norm']:.1e}; ours before_norm "
            f"{ours['before_norm']:.1e}, after_norm {ours['after_norm']:.1e}"
        )
        assert distances[meant] == 0.0 and distances[other] > 1.0
        assert ours[meant] <= TOLERANCE
        assert ours[other] > 1e4 * TOLERANCE  # negative control: the other choice fails


# ------------------------------------------------------------------------------------------------------ remembering it


def test_qwen_has_a_state_and_minilm_none():
    assert TEXT.state == "before_norm"  # what the released weights read
    assert TextConfig().state is None
    with pytest.raises(UserError, match=r"text\.state is 'after_norm', but the encoder minilm has one state alone"):
        from_dict(TextConfig, {"state": "after_norm"}, "text")
    with pytest.raises(UserError, match=r"text\.state is 'normed'; it must be one of 'before_norm', 'after_norm'"):
        from_dict(TextConfig, {"encoder": "qwen3_vl", "state": "normed"}, "text")


def test_what_was_stored_without_a_state():
    older = {name: value for name, value in to_dict(TEXT).items() if name != "state"}
    assert with_text_state({"text": older})["text"] == {**older, "state": "after_norm"}
    assert with_text_state({"text": older}, "before_norm")["text"]["state"] == "before_norm"
    assert with_text_state({"text": {**older, "encoder": "minilm"}})["text"]["state"] is None
    assert with_text_state({"text": to_dict(TEXT)})["text"] == to_dict(TEXT)


def test_two_states_of_one_encoder_do_not_meet():
    after = dataclasses.replace(TEXT, state="after_norm")
    check_text_state("/data/a holds", TEXT, TEXT)
    with pytest.raises(UserError, match=r"^/data/a holds text states of qwen3_vl after_norm, but config\.model\.text"):
        check_text_state("/data/a holds", after, TEXT)
    with pytest.raises(UserError, match=r"before_norm, but config\.model\.text\.state is 'after_norm'"):
        check_text_state("/data/a holds", TEXT, after)
