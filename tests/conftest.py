"""How every test runs: on CPU, with 8 devices, strict promotion, and the shapes in signatures checked."""

import importlib.util
import os
import sys
import traceback
from pathlib import Path

# Before jax is imported anywhere: it reads these once.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import jaxtyping
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")  # no fixture: those of a wider scope compute too
# Where arrays are: elsewhere a wrong type is bad input, and its UserError is what tests look at.
CHECKED = ["dreamlite_jax.diffusion", "dreamlite_jax.models", "dreamlite_jax.parallel", "dreamlite_jax.training"]
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


# The pinned stack of newer Pythons has none (constraints.txt); elsewhere a missing oracle is a failure.
ORACLES = [
    name for name in ("torch", "diffusers") if sys.version_info >= (3, 12) and not importlib.util.find_spec(name)
]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo):
    """Skips a test that imports an oracle where there is none; what we ship may not import one, and fails."""
    report = yield
    error = call.excinfo.value if call.excinfo else None
    if isinstance(error, ModuleNotFoundError) and error.name in ORACLES:
        file, line = traceback.extract_tb(error.__traceback__)[-1][:2]
        if item.config.rootpath / "tests" in Path(file).parents:
            report.outcome, report.longrepr = "skipped", (file, line, f"Skipped: needs {error.name}, the oracle")
    return report


def pytest_terminal_summary(terminalreporter) -> None:
    if ORACLES:
        names, python = " and ".join(ORACLES), f"{sys.version_info[0]}.{sys.version_info[1]}"
        terminalreporter.write_line(
            f"Python {python}: tests that hold us against {names} were skipped; constraints.txt pins these below 3.12"
        )
