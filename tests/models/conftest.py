"""The small Qwen3-VL: of transformers, its folder, and as we load it."""

import jax
import pytest
import qwen_oracle
from jax.sharding import AxisType


@pytest.fixture(scope="session")
def oracle():
    return qwen_oracle.small_model()


@pytest.fixture(scope="session")
def folder(oracle, tmp_path_factory):
    path = tmp_path_factory.mktemp("qwen3_vl")
    oracle.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def loaded(folder):
    from dreamlite_jax.models.qwen_vl import load

    return load.load_qwen_vl(folder)


@pytest.fixture(scope="session")
def mesh():
    return jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:8])
