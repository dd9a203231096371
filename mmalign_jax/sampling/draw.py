"""One token of a distribution over the vocabulary."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_BLOCK = 128  # tokens whose weights are added before any of them is looked at


def draw(
    logits: Float[Array, "B S V"],
    keys: Array,
    step: Int[Array, ""] | Int[Array, "B S"],
    *,
    temperature: float,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Int[Array, "B S"]:
    """A token of each lane, under its key and the number `step`. Options as of `DecodeOptions`; temperature 0 takes the likeliest.

    By inversion: one uniform number a token, and the first token at which the sum of the weights exceeds it. Gumbel noise, which
    `jax.random.categorical` adds, takes a random number for each token of the vocabulary, and on a CPU more than twice as long. Tokens of
    no weight (logit -inf) are never drawn. The uniform numbers are multiples of 2^-23.
    """
    if temperature == 0.0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < least, -jnp.inf, logits)
    if top_p < 1.0:
        order = jnp.sort(logits, axis=-1, descending=True)
        before = jnp.cumsum(jax.nn.softmax(order, axis=-1), axis=-1) - jax.nn.softmax(order, axis=-1)
        threshold = jnp.min(jnp.where(before < top_p, order, jnp.inf), axis=-1, keepdims=True)
        logits = jnp.where(logits < threshold, -jnp.inf, logits)
    # not broadcast_to, which does not have the keys' sharding
    steps = jax.random.key_data(keys)[..., 0] * 0 + jnp.asarray(step).astype(jnp.uint32)
    step_keys = jax.vmap(jax.vmap(jax.random.fold_in))(keys, steps)
    uniform = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32)))(step_keys)
    return jax.vmap(jax.vmap(_invert))(logits, uniform)


def _invert(logits: Float[Array, " V"], uniform: Float[Array, ""]) -> Int[Array, ""]:
    """The token at `uniform` of the cumulative distribution: first its block, then its place there."""
    weights = jnp.exp(logits - jnp.max(logits))
    weights = jnp.pad(weights, (0, -len(weights) % _BLOCK)).reshape(-1, _BLOCK)
    sums = jnp.sum(weights, axis=1)
    block, goal = _first_above(sums, uniform * jnp.sum(sums))
    place, _ = _first_above(weights[block], goal)
    return block * _BLOCK + place


def _first_above(weights: Float[Array, " n"], goal: Float[Array, ""]) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """The first place at which the sum of the weights up to it exceeds `goal`, and what of the goal is left in front of it.

    Where rounding keeps every sum from exceeding it: the last place that has a weight.
    """
    upto = jnp.cumsum(weights)
    last = jnp.max(jnp.where(weights > 0, jnp.arange(len(weights)), 0))
    place = jnp.minimum(jnp.sum(upto <= goal), last).astype(jnp.int32)
    # from the sum itself, which is no more than the goal; what is left must not turn negative by rounding
    return place, goal - jnp.where(place > 0, upto[place - 1], 0.0)
