"""The compiled step: one program a shape of batch, pinned activations, float32 masters, and traces on demand."""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dreamlite_jax.parallel import sharding
from dreamlite_jax.parallel.config import MeshConfig
from dreamlite_jax.training import steps
from dreamlite_jax.training.build import build
from dreamlite_jax.training.clock import Clock
from dreamlite_jax.training.config import load_config
from dreamlite_jax.training.stage import Stage


@flax.struct.dataclass
class Total:
    params: jax.Array


class Summing(Stage):
    """Adds up what it is given; counts how often it is traced."""

    traced = 0

    def __init__(self):
        pass

    def step(self, state, batch):
        self.traced += 1
        return Total(state.params + batch["x"].sum()), {"loss": batch["x"].mean()}

    def flops(self, batch):
        return float(batch["x"].size)


def test_a_program_for_each_bucket_and_none_twice():
    mesh = sharding.make_mesh(MeshConfig())
    stage, clock = Summing(), Clock()
    state = jax.device_put(Total(jnp.zeros(())), sharding.replicated(mesh))
    run = steps.Steps(stage, sharding.state_sharding(mesh, state), mesh, clock)
    rng, expected = np.random.default_rng(0), 0.0
    for width in (4, 6, 4, 6, 6, 4):  # two buckets in turns
        x = rng.integers(1, 9, size=(8, width)).astype(np.float32)
        batch = run.place({"x": x})
        assert batch["x"].sharding == sharding.batch_sharding(mesh) and run.flops(batch) == 8 * width
        with jax.transfer_guard("disallow"):
            given, (state, values) = state, run(state, batch)
        expected += x.sum()
        assert float(state.params) == pytest.approx(expected, rel=1e-5) and given.params.is_deleted()  # donated
        assert values["loss"].sharding.is_fully_replicated
    assert stage.traced == 2 and clock.compile > 0


def test_what_is_asked_for_is_traced(tmp_path):
    one = jax.jit(lambda x: x + 1.0)
    for name, start, length, expected in (("off", 0, 0, []), ("late", 0, 2, [11, 12]), ("short", 3, 2, [4, 5])):
        traced, profile = [], steps.Profile(tmp_path / name, start, 20 if name == "late" else 8, length)
        for step in range(start + 1, 21 if name == "late" else 9):
            profile.before(step)
            traced += [step] if profile.running else []
            profile.after(step, one(jnp.float32(step)))
        assert traced == expected and bool(list((tmp_path / name).rglob("*.xplane.pb"))) == bool(expected)


def lowered(run_config, devices: int, **changes) -> str:
    """The step's program before the partitioner sees it."""
    stage, feed, _ = build(load_config(run_config, [f"{name}={value}" for name, value in changes.items()]))
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        state = stage.state_shapes()
        return jax.jit(stage.step).lower(state, next(iter(feed.dataset(stage.fields)))).as_text()


def test_activations_are_pinned_where_there_is_more_than_one_device(run_config):
    blocks = 6  # res blocks and transformers of the tiny network, at least
    assert lowered(run_config, 1).count("sharding_constraint") == 0
    assert lowered(run_config, 8).count("sharding_constraint") > blocks


def test_bfloat16_works_on_float32_masters(run_config):
    stage, feed, _ = build(load_config(run_config, ["dtype=bfloat16"]))
    state = stage.state_shapes()
    after, values = jax.eval_shape(stage.step, state, next(iter(feed.dataset(stage.fields))))
    kept = {leaf.dtype for leaf in jax.tree.leaves(after)}
    assert kept == {jnp.dtype("float32"), jnp.dtype("int32")} and values["loss"].dtype == jnp.float32
    assert "bf16" in lowered(run_config, 1, dtype="bfloat16") and "bf16" not in lowered(run_config, 1)
