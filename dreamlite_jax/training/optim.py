"""AdamW with clipping and a warmup schedule, and the moving average of parameters."""

from typing import Any

import jax
import optax

from dreamlite_jax.training.config import OptimConfig, TrainConfig


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warmup, then constant, cosine or linear to `final_fraction`."""
    peak, warmup = config.learning_rate, config.warmup_steps
    end = peak * config.final_fraction
    match config.decay:
        case "constant":
            after = optax.constant_schedule(peak)
        case "cosine":
            after = optax.cosine_decay_schedule(peak, max(1, steps - warmup), config.final_fraction)
        case "linear":
            after = optax.linear_schedule(peak, end, max(1, steps - warmup))
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(1, warmup)), after], [warmup])


def warnings(config: TrainConfig) -> list[str]:
    """A line for each warmup that no step of the run leaves."""
    found, sections = [], [("config.optim", config.optim, config.steps, "steps")]
    if config.stage == "dmd2":
        updates = config.steps * config.dmd.fake_updates
        sections.append(("config.dmd.fake", config.dmd.fake, updates, "updates of the fake score"))
    for where, settings, updates, what in sections:
        if (warmup := settings.warmup_steps) >= updates:
            reached = settings.learning_rate * (updates - 1) / warmup
            found.append(
                f"{where}.warmup_steps is {warmup}, and the run has {updates} {what}: the learning rate never gets "
                f"beyond {reached:.2g} of the {settings.learning_rate:.2g} asked for"
            )
    return found


def optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW; biases and norm scales are not decayed."""

    def decayed(params):
        return jax.tree.map(lambda p: p.ndim > 1, params)

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(schedule(config, steps), config.b1, config.b2, weight_decay=config.weight_decay, mask=decayed),
    )


def update(optimizer: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any) -> tuple[Any, Any]:
    """(parameters, optimiser state) after one update."""
    with jax.numpy_dtype_promotion("standard"):  # optax mixes floats with integers; our own arithmetic does not
        updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def ema_update(ema, params, decay: float, step):
    """decay · ema + (1 - decay) · params, with the decay ramped as (1 + step) / (10 + step) while young."""
    decay = jax.numpy.minimum(decay, (1.0 + step) / (10.0 + step))
    return jax.tree.map(lambda e, p: decay * e + (1.0 - decay) * p, ema, params)
