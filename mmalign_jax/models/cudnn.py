"""Attention of packed rows by cuDNN's flash attention, through `jax.nn.dot_product_attention`. Not run on a GPU yet.

Every answer becomes a causal sequence of its own: the prefix' tokens and right behind them, without the padding, the answer's. Causality is
then all the mask there is. The prefix' own products are computed once for each answer. Two other ways would spare these and are not taken:
jax 0.10 drops the gradient of the log-sum-exp that two parts would be joined by, and asks cuDNN for the gradient of a mask given as
a bias, which cuDNN does not have for such shapes (jax issue 30593).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from mmalign_jax import mesh
from mmalign_jax.models.attention import Regions
from mmalign_jax.models.config import DecoderConfig


def attend(
    config: DecoderConfig,
    query: Float[Array, "B T H E"],
    key: Float[Array, "B T G E"],
    value: Float[Array, "B T G E"],
    there: Bool[Array, "B T"],
    regions: Regions,
    *,
    implementation: str = "cudnn",
) -> Float[Array, "B T H E"]:
    """Exact grouped-query attention of packed rows whose prefix is causal. Slots of padding get numbers without a meaning.

    Args:
      there: slots that are no padding.
      implementation: of `jax.nn.dot_product_attention`; "xla" where there is no GPU, for tests.
    """
    scale = config.head_width**-0.5 if config.query_scale is None else config.query_scale
    causal = functools.partial(jax.nn.dot_product_attention, scale=scale, is_causal=True, implementation=implementation)
    local = functools.partial(_of_device, causal, regions)
    if not mesh.active():
        return local(query, key, value, there)
    heads, kv_heads = mesh.spec("batch", None, "heads", None), mesh.spec("batch", None, "kv_heads", None)
    specs = (heads, kv_heads, kv_heads, mesh.spec("batch", None))
    return jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=False)(query, key, value, there)


def _of_device(causal, regions: Regions, query: Array, key: Array, value: Array, there: Array) -> Array:
    """`attend` of one device's rows and heads."""
    rows, slots = query.shape[:2]
    prefix, answer = regions.prefix, regions.answer
    answers = (slots - prefix) // max(answer, 1)
    if answers == 0:
        even = lambda x: jnp.pad(x, ((0, 0), (0, slots % 2), (0, 0), (0, 0)))  # noqa: E731
        return causal(even(query), even(key), even(value))[:, :slots]
    used = jnp.sum(there[:, :prefix], axis=1)
    sequences = [_closed_up(x, used, prefix, answer, answers) for x in (query, key, value)]
    mixed = causal(*sequences).reshape(rows, answers, -1, *query.shape[2:])
    # slots of the prefix behind its end hold an answer's tokens here, and nobody reads them there
    behind = jax.vmap(lambda x, start: jax.lax.dynamic_slice_in_dim(x, start, answer, axis=1))(mixed, used)
    return jnp.concatenate([mixed[:, 0, :prefix], behind.reshape(rows, answers * answer, *query.shape[2:])], axis=1)


def _closed_up(x: Float[Array, "B T H E"], used: Int[Array, " B"], prefix: int, answer: int, answers: int) -> Float[Array, "C t H E"]:
    """Prefix and answer of every answer, the answer where the prefix' tokens end; C = B K. t is P + R, or one more: jax wants it even."""
    total = prefix + answer + (prefix + answer) % 2

    def of_row(x: Float[Array, "T H E"], used: Int[Array, ""]) -> Float[Array, "K t H E"]:
        own = x[prefix:].reshape(answers, answer, *x.shape[1:])
        room = jnp.pad(x[:prefix], ((0, total - prefix), (0, 0), (0, 0)))
        return jax.vmap(lambda one: jax.lax.dynamic_update_slice_in_dim(room, one, used, axis=0))(own)

    return jax.vmap(of_row)(x, used).reshape(-1, total, *x.shape[2:])
