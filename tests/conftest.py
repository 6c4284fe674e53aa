"""How every test runs: on CPU, with 8 devices, strict promotion, and the shapes in signatures checked."""

import os

# Before jax is imported anywhere: it reads these once.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")  # no fixture: those of a wider scope compute too
# Where arrays are: elsewhere a wrong type is bad input, and its UserError is what tests look at.
CHECKED = ["dreamlite_jax.diffusion", "dreamlite_jax.models", "dreamlite_jax.training"]
jaxtyping.install_import_hook(CHECKED, "checker.check")

# Ranks must match too where broadcasting is the mathematics; the text and reward towers promote (d,) parameters freely.
STRICT_RANKS = ("tests/diffusion/", "tests/models/test_unet", "tests/models/test_vae", "tests/models/test_depthwise")


@pytest.fixture(autouse=True)
def strict_ranks(request: pytest.FixtureRequest):
    path = request.path.relative_to(request.config.rootpath).as_posix()
    with jax.numpy_rank_promotion("raise" if path.startswith(STRICT_RANKS) else "allow"):
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too: full size, minutes each")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: full size or above 20 s; runs with --slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow; run with --slow")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)
