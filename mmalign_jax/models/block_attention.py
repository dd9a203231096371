"""Exact attention, a block of queries at a time, with a backward pass of its own (as arXiv 2205.14135, section 3.1, and 2307.08691)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from mmalign_jax.models.layers import softcap
from mmalign_jax.models.remat import ATTENTION

NEVER = -1e30  # finite, so that a row of padding, which sees nothing, is not NaN
Kept = tuple[Array, Array, Array, Array | None, Array, Array, Array]  # query, key, value, mask, result, largest scores, sums of exponentials


@dataclasses.dataclass(frozen=True)
class QueryBlock:
    """Queries `start` to `stop`, and the slots of the keys that they read, in one piece or several: `((first, end), ...)`."""

    start: int
    stop: int
    keys: tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Scores:
    """How products of queries and keys become scores: times `scale`, then soft-capped."""

    scale: float
    cap: float | None = None

    def __call__(self, products: Float[Array, "*b"]) -> Float[Array, "*b"]:
        return softcap(products * self.scale, self.cap)

    def back(self, scores: Float[Array, "*b"], gradient: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """The gradient of the products, from that of the scores."""
        return gradient * self.scale if self.cap is None else gradient * (self.scale * (1 - (scores / self.cap) ** 2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attend_blocks(
    blocks: tuple[QueryBlock, ...],
    scores: Scores,
    query: Float[Array, "B G r T E"],
    key: Float[Array, "B G X E"],
    value: Float[Array, "B G X E"],
    mask: Bool[Array, "#B #T X"] | None,
) -> Float[Array, "B G r T E"]:
    """Grouped-query attention; softmax in float32. Scores of one block exist at a time.

    The backward pass computes them again. Beside its arguments it is left the result and, for each query, its largest score and the sum of its
    exponentials: so it looks for neither again, and what the derivative of the softmax sums over keys it takes from the result.

    Args:
      blocks: of all queries, in their order, without gaps.
      mask: who sees whom. A query that sees nothing gets the mean of the values that its block reads.

    Raises:
      ValueError: the blocks are not all queries one behind the other, or one reads a slot twice, or a slot that is not there.
    """
    return _forward(blocks, scores, query, key, value, mask)[0]


def _forward(blocks: tuple[QueryBlock, ...], scores: Scores, query: Array, key: Array, value: Array, mask: Array | None) -> tuple[Array, Kept]:
    _check(blocks, query.shape[3], key.shape[2])
    mixed, most, total = [], [], []
    for block in blocks:
        here, keys, values = query[..., block.start : block.stop, :], _read(key, block, 2), _read(value, block, 2)
        found = scores(jnp.einsum("bgrqe,bgxe->bgrqx", here, keys, preferred_element_type=jnp.float32))
        if mask is not None:
            found = jnp.where(_of_block(mask, block)[:, None, None], found, NEVER)
        most.append(jnp.max(found, axis=-1))
        weights = jnp.exp(found - most[-1][..., None])
        total.append(jnp.sum(weights, axis=-1))
        sums = jnp.einsum("bgrqx,bgxe->bgrqe", weights.astype(value.dtype), values, preferred_element_type=jnp.float32)
        mixed.append((sums / total[-1][..., None]).astype(value.dtype))
    result, most, total = (checkpoint_name(jnp.concatenate(parts, axis=3), ATTENTION) for parts in (mixed, most, total))
    return result, (query, key, value, mask, result, most, total)


def _backward(blocks: tuple[QueryBlock, ...], scores: Scores, kept: Kept, gradient: Float[Array, "B G r T E"]) -> tuple[Array, Array, Array, None]:
    """Keys stand before queries here: so no product needs weights transposed, which on a CPU takes as long as the product."""
    query, key, value, mask, result, most, total = kept
    f32 = {"preferred_element_type": jnp.float32}
    # of each query, the sum over keys of its weights times their gradients
    inner = jnp.sum(gradient.astype(jnp.float32) * result.astype(jnp.float32), axis=-1)
    turned = None if mask is None else mask.swapaxes(1, 2)
    of_query, of_key, of_value = [], jnp.zeros_like(key, jnp.float32), jnp.zeros_like(value, jnp.float32)
    for block in blocks:
        here = slice(block.start, block.stop)
        queries, keys, values, asked = query[..., here, :], _read(key, block, 2), _read(value, block, 2), gradient[..., here, :]
        by_query = lambda x, here=here: x[:, :, None, :, here]  # noqa: E731
        seen = True if turned is None else _read(turned if turned.shape[2] == 1 else turned[:, :, here], block, 1)[:, None, :, None]
        found = scores(jnp.einsum("bgxe,bgrqe->bgxrq", keys, queries, **f32))
        weights = jnp.exp(jnp.where(seen, found, NEVER) - by_query(most)) / by_query(total)
        of_scores = weights * (jnp.einsum("bgxe,bgrqe->bgxrq", values, asked, **f32) - by_query(inner))
        of_products = scores.back(found, jnp.where(seen, of_scores, 0)).astype(key.dtype)
        # no other block adds to it, so its type will do; in float32 CPUs have no such product of bfloat16
        of_query.append(jnp.einsum("bgxe,bgxrq->bgerq", keys, of_products).transpose(0, 1, 3, 4, 2))
        of_key = _add(of_key, jnp.einsum("bgxrq,bgrqe->bgxe", of_products, queries, **f32), block)
        of_value = _add(of_value, jnp.einsum("bgxrq,bgrqe->bgxe", weights.astype(value.dtype), asked, **f32), block)
    return jnp.concatenate(of_query, axis=3), of_key.astype(key.dtype), of_value.astype(value.dtype), None


attend_blocks.defvjp(_forward, _backward)


def _check(blocks: tuple[QueryBlock, ...], queries: int, keys: int) -> None:
    """A query that no block has would shift all behind it, and slices of what is not there are moved to what is."""
    at = 0
    for block in blocks:
        edges = [edge for piece in block.keys for edge in piece]
        if not at == block.start < block.stop or not edges or edges != sorted(edges) or not 0 <= edges[0] <= edges[-1] <= keys:
            raise ValueError(f"{block} behind query {at} of {queries}, with {keys} keys")
        at = block.stop
    if at != queries:
        raise ValueError(f"the blocks end at query {at} of {queries}")


def _of_block(mask: Bool[Array, "_B _T X"], block: QueryBlock) -> Bool[Array, "_B _q _x"]:
    return _read(mask if mask.shape[1] == 1 else mask[:, block.start : block.stop], block, 2)


def _read(x: Array, block: QueryBlock, axis: int) -> Array:
    """What the block reads along an axis of keys, one piece behind the other."""
    pieces = [jax.lax.slice_in_dim(x, first, end, axis=axis) for first, end in block.keys]
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=axis)


def _add(total: Float[Array, "B G X E"], part: Float[Array, "B G _x E"], block: QueryBlock) -> Float[Array, "B G X E"]:
    """Adds what came of the slots that the block reads, in place: sums of padded arrays would pass over all slots for every block."""
    begin = 0
    for first, end in block.keys:
        more = jax.lax.slice_in_dim(part, begin, begin + end - first, axis=2)
        old = jax.lax.slice_in_dim(total, first, end, axis=2)
        total = jax.lax.dynamic_update_slice_in_dim(total, old + more, first, axis=2)
        begin += end - first
    return total
