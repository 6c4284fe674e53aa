"""A stage of one's own: the code of docs/extending.md trains, is killed, resumes and exports; what is wrong is said."""

import os
import re
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
import tiny
from runs import KillAtStep, finish, rows, saved_steps, start, weights

from dreamlite_jax import model_folder, train
from dreamlite_jax.errors import UserError
from dreamlite_jax.training.build import build
from dreamlite_jax.training.config import load_config
from dreamlite_jax.training.stage import Stage
from dreamlite_jax.training.stages import table

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
(CODE,) = re.findall(r"```python\n(.*?)```", PAGE, re.S)
COMMANDS = re.findall(r"```sh\n(.*?)```", PAGE, re.S)[0].splitlines()


class In:
    """What a run does first: it goes to a folder, and then does what `then` says."""

    def __init__(self, folder: Path, then=None):
        self.folder, self.then = folder, then

    def __call__(self, workdir: Path) -> None:
        os.chdir(self.folder)
        if self.then:
            self.then(workdir)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The page's file beside a small config to start from."""
    root = tiny.write_inputs(tmp_path_factory.mktemp("extending"))
    tiny.write_config(root / "small.py", tiny.train_config(root, steps=8))
    (root / "mine.py").write_text(CODE)
    return root


def arguments(command: str) -> list[str]:
    """Of a command of the page, at a reduced size."""
    program, argv = shlex.split(command)[:3], shlex.split(command)[3:]
    assert program == ["python", "-m", "dreamlite_jax.train"]
    return ["mine.py:small.py" if word == "mine.py" else word for word in argv]


def test_the_page_s_check_says_what_would_run(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    assert train.main(arguments(COMMANDS[0])) == 0
    said = capsys.readouterr().out
    assert "stage mine.py:Contrastive, 8 steps" in said and "contrast" in said
    assert not (folder / "runs").exists()


def test_the_page_s_stage_is_killed_resumes_and_exports(folder):
    own = [word for word in arguments(COMMANDS[1]) if word.startswith("--config.")]
    flags = (*own, "--config.accumulate=2")
    assert flags[0] == "--config.contrastive.weight=0.05"
    whole, killed = folder / "whole", folder / "killed"
    finish(start("mine.py:small.py", whole, In(folder), flags, devices=1), whole)
    act = In(folder, KillAtStep(7, saved=4))
    finish(start("mine.py:small.py", killed, act, flags, devices=1), killed, (-signal.SIGKILL,))
    assert saved_steps(killed) == ["4"] and not (killed / "model").exists()
    finish(start("mine.py:small.py", killed, In(folder), flags, devices=1), killed)
    assert "resumed from step 4" in killed.with_suffix(".log").read_text()
    assert weights(killed) == weights(whole) and rows(killed) == rows(whole)
    for row in rows(whole):
        np.testing.assert_allclose(row["loss"], row["mse"] - 0.05 * row["contrast"], rtol=1e-5)
    assert model_folder.load_config(whole / "model") == tiny.CONFIG
    recorded = model_folder.load_provenance(whole / "model")["config"]
    assert recorded["stage"] == "mine.py:Contrastive" and recorded["contrastive"] == {"weight": 0.05}


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["contrastive.weigth=0.1"], r"config.contrastive.weigth is not a known field; did you mean 'weight'"),
        (["contrastive.weight=2"], r"config.contrastive.weight is 2.0; it must be at least 0 and below 1"),
        (["contrastive.weight=much"], r"config.contrastive.weight is 'much' \(str\); it must be float"),
        (["stage=mine.py:Contrastiv"], r"mine.py has no stage 'Contrastiv'; did you mean 'Contrastive'"),
        (["stage=mine.py:ContrastiveConfig"], r"has no stage 'ContrastiveConfig'"),
        (["stage=yours.py:Contrastive"], r"config.stage names .*yours.py, but there is no such file"),
        (["stage=mine:Contrastive"], r"config.stage is 'mine:Contrastive'; it must be one of .* FILE.py:CLASS"),
        (["stage=flow_matching"], r"config.contrastive is not a known field"),
        (["data.encode=on_device"], r"stage mine.py:Contrastive needs 'precomputed'"),
    ],
)
def test_its_config_is_checked_as_ours_are(folder, monkeypatch, overrides, says):
    monkeypatch.chdir(folder)
    assert load_config("mine.py:small.py").contrastive.weight == 0.02
    with pytest.raises(UserError, match=says):
        load_config("mine.py:small.py", overrides)


BASE = "from dreamlite_jax.training.stage import DenoisingStage\nclass Mine(DenoisingStage):\n"
LOSS = "    def loss(self, params, batch, key):\n        return params['conv_out']['bias'].sum(), {'level': key}\n"


@pytest.mark.parametrize(
    ("name", "body", "says"),
    [
        ("limit", LOSS + "    limit = {'level': (0.0, 1.0)}\n", "Mine has 'limit', which nothing reads; .* 'limits'"),
        (
            "late",
            LOSS + "    def __init__(self, *parts):\n        super().__init__(*parts)\n        self.limit = {}\n",
            "Mine has 'limit', which nothing reads; .* 'limits'",
        ),
        ("flop", LOSS + "    def flop(self, batch):\n        return 1.0\n", "Mine has 'flop', .* 'flops'"),
        ("accumulate", LOSS + "    accumulate = True\n", "Mine has 'accumulate', .* 'accumulates'"),
        ("los", LOSS.replace("def loss", "def los"), "Mine has 'los', which nothing reads; did you mean 'loss'"),
        ("none", "    pass\n", "Mine has no loss: it needs `loss`, or `draw` and `mean_loss`, or a `step`"),
        ("half", "    def draw(self, batch, key):\n        return batch\n", "Mine has no loss"),
        ("parts", LOSS + "    accumulates = True\n", "accumulates = True, but not `draw` and `mean_loss`"),
        ("bounds", LOSS + "    limits = {'level': 3.0}\n", r"limits\['level'\] is 3.0; it must be \(least, most\)"),
        ("config", LOSS + "    Config = dict\n", "Config must be a frozen dataclass"),
    ],
)
def test_a_member_that_nothing_reads_is_refused(folder, monkeypatch, name, body, says):
    monkeypatch.chdir(folder)
    (folder / f"{name}.py").write_text(BASE + body)
    with pytest.raises(UserError, match=says):
        build(load_config("small.py", [f"stage={name}.py:Mine"]))


def test_a_limit_on_a_metric_that_no_step_gives_is_said_first(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "unmet.py").write_text(
        BASE + LOSS.replace("key}", "batch['mask'].sum()}") + "    limits = {'levle': (0.0, 9.9)}\n"
    )
    with pytest.raises(UserError, match="stage Mine: its step gives no 'levle'; did you mean 'level'"):
        train.main(["--config", "small.py", "--workdir", "unmet", "--config.stage=unmet.py:Mine", "--check"])


def test_a_name_of_its_own_is_free(folder, monkeypatch):
    """The negative control of the test above; and a section that would hide one of ours is refused."""
    monkeypatch.chdir(folder)
    (folder / "free.py").write_text(BASE + LOSS + "    helper = 1\n    _limit = 2\n")
    assert isinstance(build(load_config("small.py", ["stage=free.py:Mine"])).stage, Stage)
    settings = "import dataclasses\n@dataclasses.dataclass(frozen=True)\nclass C:\n    x: int = 1\n"
    (folder / "flow.py").write_text(settings + BASE.replace("class Mine", "class Flow") + LOSS + "    Config = C\n")
    with pytest.raises(UserError, match=r"config\.flow has a meaning already; name the class otherwise"):
        load_config("small.py", ["stage=flow.py:Flow"])


@pytest.mark.parametrize("name", list(table.STAGES))
def test_the_table_says_of_our_stages_what_their_classes_say(name):
    from dreamlite_jax.training.build import stage_class

    kind, row = stage_class(name), table.find(name)
    assert (kind.accumulates, kind.encodes) == (row.accumulates, row.encodes)
