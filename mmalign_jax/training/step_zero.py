"""Before the first step policy and reference are the same model: how far the two come apart says whether a cached reference fits."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mmalign_jax.training.loss import LossFunction
from mmalign_jax.types import PairBatch, TrainState

MOST = 1e-2  # nats an answer


def largest_log_ratio(loss: LossFunction, state: TrainState, batch: PairBatch) -> float:
    """max |log pi(y) - log pi_ref(y)| over the answers of rows `[A, B]` that bring the reference's log-probs."""

    @jax.jit
    def largest(params: dict, frozen: dict, batch: PairBatch, key: Array) -> Array:
        def of(some: PairBatch) -> Array:
            stats = loss.statistics(params, frozen, None, some, key)
            both = [logps for logps in (stats.answers, stats.other_image) if logps is not None]
            return jnp.max(jnp.stack([jnp.max(jnp.abs(logps.policy - logps.reference)) for logps in both]))

        return jnp.max(jax.lax.map(of, batch))

    return float(largest(state.params, state.frozen, batch, state.key))


def in_words(apart: float) -> str:
    """What is wrong with a policy that is so far from its reference before it is trained; "" where nothing is."""
    if apart < MOST:
        return ""
    return (
        f"before the first step, policy and cached reference are up to {apart:.2g} nats an answer apart, more than {MOST:g}, so they are computed "
        "differently. Use float32 (config.model.compute_dtype) or a live reference (config.reference.kind)"
    )
