"""State and step of a stage that is one loss and one optimiser."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dreamlite_jax.training import optim
from dreamlite_jax.training.config import OptimConfig, TrainConfig

# (params, batch, key) -> (loss, metrics)
LossFn = Callable[[Any, dict[str, jax.Array], jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


@flax.struct.dataclass
class TrainState:
    """Parameters, their average, the optimiser's state and the number of steps taken: arrays, shapes or shardings."""

    params: Any
    ema: Any
    opt_state: Any
    step: Any


def create(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    return TrainState(params, jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.zeros((), jnp.int32))


def make_step(
    loss_fn: LossFn, config: OptimConfig, steps: int, seed: int
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """One optimisation step; everything random comes from (seed, step)."""
    optimizer, learning_rate = optim.optimizer(config, steps), optim.schedule(config, steps)

    def step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params, batch, key)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes floats with integers; our own arithmetic does not
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            rate = jnp.asarray(learning_rate(state.step), jnp.float32)
        params = optax.apply_updates(state.params, updates)
        ema = optim.ema_update(state.ema, params, config.ema_decay, state.step.astype(jnp.float32))
        metrics = {
            "loss": loss,
            **metrics,
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
            "learning_rate": rate,
        }
        return TrainState(params, ema, opt_state, state.step + 1), metrics

    return step


class OneLoss:
    """State and step of a stage that has `config`, `init_params(key)` and `loss(params, batch, key)`."""

    config: TrainConfig
    init_params: Callable[[jax.Array], Any]
    loss: LossFn

    def init_state(self, key: jax.Array) -> TrainState:
        return create(self.init_params(key), optim.optimizer(self.config.optim, self.config.steps))

    def step(self, state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, dict[str, jax.Array]]:
        """One optimisation step."""
        config = self.config
        return make_step(self.loss, config.optim, config.steps, config.seed)(state, batch)
