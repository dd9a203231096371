"""A token of a distribution over the vocabulary."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

_BLOCK = 128  # tokens that are drawn among together


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

    A block of the vocabulary is drawn by its weight, then a token of it, both by the Gumbel-max trick: the distribution of
    `jax.random.categorical` with a random number for each block and each token of one, in the place of one for each token of the vocabulary,
    which take most of a draw's time on a CPU. A difference in rounding changes a draw only where two candidates are as good as equal, and
    tokens of no weight (logit -inf) are never drawn while another has some.
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
    return jax.vmap(jax.vmap(_of_blocks))(logits, step_keys)


def _of_blocks(logits: Float[Array, " V"], key: Array) -> Int[Array, ""]:
    of_block, of_token = jax.random.split(key)
    blocks = jnp.pad(logits, (0, -len(logits) % _BLOCK), constant_values=-jnp.inf).reshape(-1, _BLOCK)
    block = _gumbel_max(jax.nn.logsumexp(blocks, axis=1), of_block)
    return block * _BLOCK + _gumbel_max(blocks[block], of_token)


def _gumbel_max(logits: Float[Array, " n"], key: Array) -> Int[Array, ""]:
    return jnp.argmax(logits + jax.random.gumbel(key, logits.shape, logits.dtype)).astype(jnp.int32)
