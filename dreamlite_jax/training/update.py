"""The one way parameters are trained: gradient, clipping, AdamW, moving average, metrics."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dreamlite_jax.parallel import sharding
from dreamlite_jax.training import optim
from dreamlite_jax.training.config import OptimConfig
from dreamlite_jax.training.state import TrainState

Metrics = dict[str, jax.Array]
# (params, …) -> (loss, anything else)
Loss = Callable[..., tuple[jax.Array, Any]]


def step_key(seed: int, state: TrainState) -> jax.Array:
    """The key of a step's random numbers: of seed and step alone, so that a resumed run draws what others draw."""
    return jax.random.fold_in(jax.random.key(seed), state.step)


class Update:
    """Updates of one network: `gradient`, then `apply`.

    Args:
      steps: updates of the whole run, for the learning rate's schedule.
      gather: gives the whole parameters to the loss; default: in `dtype`, to which the loss casts large ones anyway.
    """

    def __init__(
        self, config: OptimConfig, steps: int, dtype: Any = jnp.float32, gather: Callable[[Any], Any] | None = None
    ):
        self.config = config
        self.optimizer, self.learning_rate = optim.optimizer(config, steps), optim.schedule(config, steps)
        self.gather = gather or functools.partial(sharding.gathered, dtype=dtype)

    def begin(self, params: Any) -> TrainState:
        """The state before the first step."""
        ema = jax.tree.map(jnp.copy, params)
        return TrainState(params, ema, self.optimizer.init(params), jnp.zeros((), jnp.int32))

    def gradient(self, loss: Loss, params: Any, *inputs: Any) -> tuple[tuple[jax.Array, Any], Any]:
        """(what `loss(params, *inputs)` returns, its gradient)."""
        return self._gradient(loss, self.gather(params), params, *inputs)

    @staticmethod
    def _gradient(loss: Loss, whole: Any, params: Any, *inputs: Any) -> tuple[tuple[jax.Array, Any], Any]:
        result, grads = jax.value_and_grad(loss, has_aux=True)(whole, *inputs)
        return result, sharding.owned(grads, params)

    def gradient_in_parts(self, loss: Loss, params: Any, rows: Any, count: int) -> tuple[tuple[jax.Array, Any], Any]:
        """`gradient`, a part of the rows at a time; `loss(params, rows)` returns plain means over the rows."""

        def mean(whole: Any, rows: Any) -> Any:
            def one(part: Any) -> Any:
                return self._gradient(loss, whole, params, part)

            def add(total: Any, part: Any) -> tuple[Any, None]:
                return sharding.like_state(jax.tree.map(jnp.add, total, one(part))), None

            shapes = jax.eval_shape(one, jax.tree.map(lambda x: x[0], rows))
            total, _ = jax.lax.scan(add, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes), rows)
            return jax.tree.map(lambda x: x / count, total)

        return sharding.mean_over_data(mean)(self.gather(params), sharding.microbatches(rows, count))

    def apply(self, state: TrainState, grads: Any, metrics: Metrics) -> tuple[TrainState, Metrics]:
        """(next state, `metrics` with the norms and the rate): clips, updates and averages the parameters."""
        params, opt_state = optim.update(self.optimizer, grads, state.opt_state, state.params)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes floats with integers; our own arithmetic does not
            rate = jnp.asarray(self.learning_rate(state.step), jnp.float32)
        ema = optim.ema_update(state.ema, params, self.config.ema_decay, state.step.astype(jnp.float32))
        norms = {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params), "learning_rate": rate}
        state = state.replace(params=params, ema=ema, opt_state=opt_state, step=state.step + 1)
        return state, {**metrics, **norms}
