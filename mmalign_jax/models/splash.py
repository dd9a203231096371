"""Attention of packed rows by JAX's splash kernel for TPUs (`jax.experimental.pallas.ops.tpu.splash_attention`).

The mask is the same for all rows: the prefix sees itself, an answer the prefix and itself. It is known when the program is compiled, so
blocks that it hides cost nothing. What differs between rows is told by segment: padding, and which of a row's pairs a token belongs to.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Bool, Float, Int

from mmalign_jax import mesh
from mmalign_jax.models.attention import Regions
from mmalign_jax.models.config import DecoderConfig
from mmalign_jax.models.remat import ATTENTION

LANES = 128  # blocks are multiples of it, and so are the heads' channels beyond it
_LARGEST = 512
# Products of larger blocks beside those of the smallest. These are few for a step of the grid, 8 MFLOP at 128 channels; not measured
_MOST_WASTE = 1.6


def attend(
    config: DecoderConfig,
    query: Float[Array, "B T H E"],
    key: Float[Array, "B T G E"],
    value: Float[Array, "B T G E"],
    there: Bool[Array, "B T"],
    regions: Regions,
    segment: Int[Array, "B T"] | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "B T H E"]:
    """Exact grouped-query attention of packed rows; softmax in float32. Slots of padding get numbers without a meaning.

    Args:
      there: slots that are no padding.
      segment: `PairBatch.segment`, of rows with several pairs.
      interpret: without a TPU, for tests.
    """
    # the kernel has no factor of its own; in float32, so that a query is rounded once
    scale = config.head_width**-0.5 if config.query_scale is None else config.query_scale
    query = (query.astype(jnp.float32) * scale).astype(query.dtype)
    local = functools.partial(_of_device, config.attention_softcap, regions, interpret)
    # 0 for padding, which sees itself alone, so that no softmax is empty
    seen = there.astype(jnp.int32) if segment is None else jnp.where(there, segment + 1, 0).astype(jnp.int32)
    if not mesh.active():
        return local(query, key, value, seen)
    heads, kv_heads = mesh.spec("batch", None, "heads", None), mesh.spec("batch", None, "kv_heads", None)
    specs = (heads, kv_heads, kv_heads, mesh.spec("batch", None))
    # the kernel's outputs do not say over which axes they vary
    return jax.shard_map(local, in_specs=specs, out_specs=heads, check_vma=False)(query, key, value, seen)


def _of_device(softcap: float | None, regions: Regions, interpret: bool, query: Array, key: Array, value: Array, seen: Array) -> Array:
    """`attend` of one device's rows and heads, queries multiplied by their factor."""
    slots, width = query.shape[1], query.shape[-1]
    size, padded = block_size(regions, slots)
    channels = width if width <= LANES else _up(width, LANES)
    place = lambda x: jnp.pad(x, ((0, 0), (0, padded - slots), (0, 0), (0, channels - width))).swapaxes(1, 2)  # noqa: E731
    segment = jnp.pad(seen, ((0, 0), (0, padded - slots)))
    blocks = {name: size for name in _BLOCKS}
    mask = masks.MultiHeadMask([masks.NumpyMask(static_mask(regions, slots, padded))])  # one for all heads
    kernel = kernels.make_splash_mha(
        mask,
        block_sizes=kernels.BlockSizes(**blocks),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        residual_checkpoint_name=ATTENTION,
        interpret=interpret,
    )
    mixed = jax.vmap(kernel)(place(query), place(key), place(value), kernels.SegmentIds(segment, segment))
    return mixed.swapaxes(1, 2)[:, :slots, :, :width]


_BLOCKS = (
    "block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq", "block_kv_dq",
)  # fmt: skip


@functools.lru_cache(4)
def static_mask(regions: Regions, slots: int, padded: int) -> Bool[np.ndarray, "t t"]:
    """Who sees whom in a row without padding. Slots behind the row, up to `padded`, see one another, so that no softmax is empty. Read only."""
    key, allowed = np.arange(padded, dtype=np.int32), np.zeros((padded, padded), bool)
    for first, end in _seen(regions, slots, padded):
        allowed |= (key >= first[:, None]) & (key < end[:, None])
    allowed.flags.writeable = False
    return allowed


_Spans = tuple[Int[np.ndarray, " t"], Int[np.ndarray, " t"]]


def _seen(regions: Regions, slots: int, padded: int) -> tuple[_Spans, _Spans]:
    """(first key, end of keys) of each query: in the prefix, and in its own answer. In rows of several pairs, what is further apart within a region
    is of two of them. A row of a mask has T^2 slots, and these are long."""
    slot, prefix = np.arange(padded, dtype=np.int32), np.int32(min(regions.prefix, slots))
    of_prefix, inside = slot < prefix, slot < slots
    ahead = slot + 1 if regions.causal else np.minimum(prefix, slot + regions.reach[0])
    begin = regions.prefix + (slot - regions.prefix) // max(regions.answer, 1) * regions.answer
    begin = np.where(inside, np.maximum(begin, slot - regions.reach[1] + 1), slots)
    seen = (np.where(of_prefix, np.maximum(0, slot - regions.reach[0] + 1), 0), np.where(of_prefix, ahead, np.where(inside, prefix, 0)))
    own = (np.where(of_prefix, 0, begin), np.where(of_prefix, 0, slot + 1))
    return tuple(x.astype(np.int32) for x in seen), tuple(x.astype(np.int32) for x in own)


@functools.cache
def block_size(regions: Regions, slots: int) -> tuple[int, int]:
    """(side of a block, slots of a row that is a multiple of it): the largest whose blocks compute not much more than the smallest do."""
    computed = {size: _products(regions, slots, size) for size in range(LANES, _LARGEST + 1, LANES)}
    size = max(size for size, count in computed.items() if count <= _MOST_WASTE * computed[LANES])
    return size, _up(slots, size)


def _products(regions: Regions, slots: int, size: int) -> int:
    """Products of queries and keys in the blocks that are not hidden as a whole."""
    padded = _up(slots, size)
    start, seen = np.arange(0, padded, size, dtype=np.int32), np.zeros((padded, padded // size), bool)
    for first, end in _seen(regions, slots, padded):
        seen |= (first < end)[:, None] & (start < end[:, None]) & (start + size > first[:, None])
    return int(seen.reshape(padded // size, size, -1).any(axis=1).sum()) * size * size


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
