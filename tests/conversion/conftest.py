"""One small model, converted once for all tests of this folder."""

import jax
import pytest
from litert_models import random_params, small_config

from dreamlite_jax import model_folder


@pytest.fixture(scope="package", autouse=True)
def quick_compilation():
    """Every function here is compiled for one or two calls; at full optimisation compiling is most of the time."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory):
    """A model folder with random weights."""
    config = small_config()
    params = {component: random_params(config, component) for component in model_folder.COMPONENTS}
    folder = tmp_path_factory.mktemp("models") / "small"
    return model_folder.save_model(folder, config, params, {"source": "random"})


@pytest.fixture(scope="session")
def litert_model(small_model, tmp_path_factory):
    """The same converted by the command, which compares every component and a picture."""
    from conversion import to_litert

    folder = tmp_path_factory.mktemp("litert") / "small"
    assert to_litert.main(["--model", str(small_model), "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def released(tmp_path_factory):
    """Parts of a small released pipeline, its folder, and that folder there and back."""
    import released_folder

    from conversion import from_torch, to_torch

    parts, root = released_folder.components(), tmp_path_factory.mktemp("released")
    source = released_folder.write(root / "theirs", parts, "DreamLiteMobilePipeline", max_shard_size="500KB")
    report = from_torch.convert(str(source), root / "ours")
    to_torch.convert(root / "ours", root / "back")
    return parts, source, root / "ours", root / "back", report
