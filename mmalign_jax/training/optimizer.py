"""Optimizer and learning-rate schedule from their settings."""

from collections.abc import Mapping

import jax
import optax

from mmalign_jax.config import OptimizerConfig
from mmalign_jax.models.config import LORA_A, LORA_B

_DECAYED = ("kernel", "embedding", LORA_A, LORA_B)


def make_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, then cosine, linear or constant. The final learning rate is reached behind the last step, as in transformers."""
    peak, final = config.learning_rate, config.learning_rate * config.final_fraction
    warmup_steps = min(round(config.warmup_fraction * steps), steps - 1)
    rest = steps - warmup_steps
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, final, rest)
    else:
        after = optax.constant_schedule(peak)
    if not warmup_steps:
        return after
    # the first step already moves: warm-up goes from peak / (n + 1)
    warmup = optax.linear_schedule(peak / (warmup_steps + 1), peak, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])


def make_optimizer(config: OptimizerConfig, steps: int, updates: int = 1) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) behind an optional clip by global norm. Norm scales and biases are not decayed.

    A part with a learning rate of its own moves by as many times more or less; the schedule is the same for all.

    Args:
      updates: of each step; all of them have the step's learning rate.
    """
    schedule = make_schedule(config, steps)
    adamw = optax.adamw(
        schedule if updates == 1 else lambda count: schedule(count // updates),
        b1=config.b1,
        b2=config.b2,
        weight_decay=config.weight_decay,
        mu_dtype=config.moment_dtype,
        mask=_decayed,
    )
    steps_of = [adamw]
    if config.clip_norm:
        steps_of.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if factors := {part: rate / config.learning_rate for part, rate in config.rates.items() if rate}:
        steps_of.append(optax.stateless(lambda updates, _: _scaled(updates, factors)))
    return optax.chain(*steps_of) if len(steps_of) > 1 else adamw


def _scaled(updates: dict, factors: Mapping[str, float]) -> dict:
    """Each part's updates by its factor, if it has one."""
    return {part: optax.tree.scale(factors[part], tree) if part in factors else tree for part, tree in updates.items()}


def _decayed(params: dict) -> dict:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in _DECAYED, params)
