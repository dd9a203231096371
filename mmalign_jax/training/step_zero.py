"""Before the first step two ways of computing the same must agree: policy and cached reference are one model, and so are sampler and trainer."""

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mmalign_jax.errors import UserError
from mmalign_jax.models.tree import union
from mmalign_jax.training.branches import Side
from mmalign_jax.training.loss import LossFunction
from mmalign_jax.types import PairBatch, TrainState

MOST = 1e-2  # nats an answer
MOST_OF_A_TOKEN = {"float32": 1e-4, "bfloat16": 0.25}  # relative to 1 + the nats of the token


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


def check_samples(loss: LossFunction, state: TrainState, batch: PairBatch) -> None:
    """Raises UserError where tokens of rows `[A, B]` had other log-probs when they were drawn than they have now, by the same policy."""

    @jax.jit
    def largest(params: dict, frozen: dict, batch: PairBatch) -> Array:
        side = Side(loss.model, union(params, frozen))

        def of(some: PairBatch) -> Array:
            found = side.tokens(side.hidden(side.tower(some), some), some)
            drawn = some.by_answer(some.drawn_logps)
            apart = jnp.abs(found.logps - drawn) / (1 + jnp.abs(found.logps))
            return jnp.max(jnp.where(found.mask & ~jnp.isnan(drawn), apart, 0.0))

        return jnp.max(jax.lax.map(of, batch))

    apart, most = float(largest(state.params, state.frozen, batch)), MOST_OF_A_TOKEN[loss.model.dtype]
    if not apart <= most:
        raise UserError(
            f"the log-probs of sampled tokens and the same tokens' in training are {apart:.2g} (1 + nats) apart, more than "
            f"{most:g}: the sampler does not compute the policy that is trained. This is a defect; please report it with the model's config.json"
        )
