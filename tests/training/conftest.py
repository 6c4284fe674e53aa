"""One undisturbed run of the training command, with which the tests of the loop compare theirs."""

import pytest
import tiny
from runs import finish, start

STEPS, DEVICES = 12, 2  # a checkpoint every 4 steps


@pytest.fixture(scope="session")
def run_root(tmp_path_factory):
    """Folder of the inputs, the runs and what was compiled for them."""
    return tiny.write_inputs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def run_config(run_root):
    return str(tiny.write_config(run_root / "config.py", tiny.train_config(run_root, steps=STEPS)))


@pytest.fixture(scope="session")
def whole(run_root, run_config):
    """Workdir of a run on two devices that nobody disturbed."""
    finish(start(run_config, run_root / "whole", devices=DEVICES), run_root / "whole")
    return run_root / "whole"
