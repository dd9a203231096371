"""Rows without the slots that nothing may look at: what is hidden need not be computed."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from mmalign_jax.types import BY_SLOT, PAD, PREFIX, PairBatch


def kept_slots(batch: PairBatch, visible: Bool[Array, "B T"]) -> Bool[Array, "B P"]:
    """The slots of the prefix that have to be computed: visible ones, and the last, behind which an answer starts."""
    inside = batch.role[:, : batch.prefix_slots] == PREFIX
    slots = jnp.arange(batch.prefix_slots)
    last = jnp.max(jnp.where(inside, slots, -1), axis=1, keepdims=True)
    return inside & (visible[:, : batch.prefix_slots] | (slots == last))


def without_hidden(
    batch: PairBatch, visible: Bool[Array, "B T"], prefix_slots: int
) -> tuple[PairBatch, Bool[Array, "B N"], Int[Array, "B T"]]:
    """The same rows with only the kept slots of the prefix, in `prefix_slots` slots, N = prefix_slots + K R in all.

    Positions are kept, so that prefill and decode give what they give for the whole rows under `visible`, to the order of sums: a
    slot that is hidden is a key of no query, in no layer.

    Args:
      visible: slots that may be seen at all. Those of answers are.
      prefix_slots: at least as many as any row keeps (`kept_slots`); what does not fit would be lost.

    Returns:
      The rows, what is visible of them, and for each of the old slots where it is now (of kept ones alone it means something).
    """
    old, kept = batch.prefix_slots, kept_slots(batch, visible)
    # sorting by place is stable: what is kept comes first, in order
    source = jnp.argsort(~kept, axis=1, stable=True)[:, :prefix_slots]
    inside = jnp.arange(prefix_slots) < jnp.sum(kept, axis=1, keepdims=True)

    def move(values: Array, empty: int | bool) -> Array:
        prefix = jnp.where(inside, jnp.take_along_axis(values[:, :old], source, axis=1), empty)
        return jnp.concatenate([prefix, values[:, old:]], axis=1)

    empty = {"role": PAD, "image_index": -1}
    moved = {name: move(values, empty.get(name, 0)) for name in BY_SLOT if name != "mrope" and (values := getattr(batch, name)) is not None}
    if batch.mrope is not None:  # three numbers a slot
        moved["mrope"] = jax.vmap(lambda values: move(values, 0), in_axes=1, out_axes=1)(batch.mrope)
    place = jnp.cumsum(kept, axis=1) - 1
    behind = jnp.zeros_like(batch.tokens[:, old:]) + prefix_slots + jnp.arange(batch.tokens.shape[1] - old)  # zeros_like keeps the sharding
    return (
        dataclasses.replace(batch, **moved, prefix_slots=prefix_slots),
        move(visible, False),
        jnp.concatenate([jnp.maximum(place, 0), behind], axis=1),
    )
