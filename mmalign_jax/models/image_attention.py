"""Where answers look: how much of their attention goes to each image of the prompt, without attention that is kept."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmalign_jax import mesh
from mmalign_jax.models.attention import Regions, attention_weights
from mmalign_jax.models.config import DecoderConfig


def image_mass(
    config: DecoderConfig,
    query: Float[Array, "B T H E"],
    key: Float[Array, "B T G E"],
    mask: Bool[Array, "B T T"],
    regions: Regions,
    membership: Float[Array, "B P M"],
) -> Float[Array, "B KR M"]:
    """The attention of each slot of the answers to each image of its row: weights summed over the image's tokens, mean over heads, float32.

    Only queries of answers are looked at, a block at a time, so the weights of one block exist at a time. What is left to 1 went to text.

    Args:
      membership: 1 where a slot of the prefix holds a token of the image, 0 elsewhere.
      mask, regions: see `attention.attend`.
    """
    prefix, answer = regions.prefix, regions.answer
    query = mesh.reshape(query, (*query.shape[:2], key.shape[2], -1, query.shape[3]), "batch", None, "kv_heads", None, None)
    query, key = query.transpose(0, 2, 3, 1, 4), key.swapaxes(1, 2)
    out = []
    for begin in range(prefix, query.shape[3], max(answer, 1)):
        for start, stop, first, seen in regions.answer_blocks:
            here, own = slice(begin + start, begin + stop), slice(begin + first, begin + seen)
            keys = jnp.concatenate([key[:, :, :prefix], key[:, :, own]], axis=2)
            allowed = jnp.concatenate([mask[:, here, :prefix], mask[:, here, own]], axis=2)
            weights = attention_weights(config, query[..., here, :], keys, allowed)[..., :prefix]
            out.append(jnp.einsum("bqk,bkm->bqm", jnp.mean(weights, axis=(1, 2)), membership))
    return jnp.concatenate(out, axis=1)
