"""State and step of a stage that is one loss and one optimiser."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax

from dreamlite_jax.training import optim, sharding
from dreamlite_jax.training.config import OptimConfig, TrainConfig

Metrics = dict[str, jax.Array]
# (params, batch, key) -> (loss, metrics)
LossFn = Callable[[Any, dict[str, jax.Array], jax.Array], tuple[jax.Array, Metrics]]


@flax.struct.dataclass
class TrainState:
    """Parameters, their average, the optimiser's state and the number of steps taken: arrays, shapes or shardings."""

    params: Any
    ema: Any
    opt_state: Any
    step: Any


class Parts(NamedTuple):
    """A loss that can be had in parts of a batch: (loss, metrics) are plain means over the rows of `draw`'s result.

    Attributes:
      draw: (batch, key) -> arrays with a row an item: all that is random, and all that looks over the whole batch.
      mean_loss: (params, rows of those arrays) -> (loss, metrics).
    """

    draw: Callable[[dict[str, jax.Array], jax.Array], Any]
    mean_loss: Callable[[Any, Any], tuple[jax.Array, Metrics]]


def create(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; made where it belongs, when the parameters are on the mesh."""

    def make(params: Any) -> TrainState:
        return TrainState(params, jax.tree.map(jnp.copy, params), optimizer.init(params), jnp.zeros((), jnp.int32))

    return sharding.born(make, params)


def make_step(
    loss_fn: LossFn,
    config: OptimConfig,
    steps: int,
    seed: int,
    accumulate: int = 1,
    parts: Parts | None = None,
    dtype: Any = jnp.float32,
) -> Callable[[TrainState, dict[str, jax.Array]], tuple[TrainState, Metrics]]:
    """One optimisation step; everything random comes from (seed, step).

    Args:
      accumulate: number of microbatches that a batch is worked through in; above 1 the loss is that of `parts`.
      dtype: that the loss casts large parameters to; under ZeRO they are gathered in it.
    """
    optimizer, learning_rate = optim.optimizer(config, steps), optim.schedule(config, steps)

    def gradients(params: Any, batch: dict[str, jax.Array], key: jax.Array) -> tuple[tuple[jax.Array, Metrics], Any]:
        whole = sharding.gathered(params, dtype)

        def owned(result: Any) -> Any:
            values, grads = result
            return values, sharding.owned(grads, params)

        if accumulate == 1:
            return owned(jax.value_and_grad(loss_fn, has_aux=True)(whole, batch, key))
        one = jax.value_and_grad(parts.mean_loss, has_aux=True)
        rows = sharding.microbatches(parts.draw(batch, key), accumulate)

        def mean(whole: Any, rows: Any) -> Any:
            def add(total: Any, part: Any) -> tuple[Any, None]:
                return sharding.like_state(jax.tree.map(jnp.add, total, owned(one(whole, part)))), None

            shapes = jax.eval_shape(lambda part: owned(one(whole, part)), jax.tree.map(lambda x: x[0], rows))
            total, _ = jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), rows)
            return jax.tree.map(lambda x: x / accumulate, total)

        return sharding.mean_over_data(mean)(whole, rows)

    def step(state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        (loss, metrics), grads = gradients(state.params, batch, key)
        params, opt_state = optim.update(optimizer, grads, state.opt_state, state.params)
        with jax.numpy_dtype_promotion("standard"):
            rate = jnp.asarray(learning_rate(state.step), jnp.float32)
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
    """State and step of a stage that has `config`, `init_params(key)` and `loss(params, batch, key)`.

    One whose loss can be had in parts has `draw` and `mean_loss` too (see `Parts`), and may accumulate.
    """

    config: TrainConfig
    init_params: Callable[[jax.Array], Any]
    loss: LossFn

    def init_state(self, key: jax.Array) -> TrainState:
        return create(self.init_params(key), optim.optimizer(self.config.optim, self.config.steps))

    def step(self, state: TrainState, batch: dict[str, jax.Array]) -> tuple[TrainState, Metrics]:
        """One optimisation step."""
        config = self.config
        parts = Parts(self.draw, self.mean_loss) if hasattr(self, "draw") else None
        step = make_step(
            self.loss, config.optim, config.steps, config.seed, config.accumulate, parts, jnp.dtype(config.dtype)
        )
        return step(state, batch)
