"""Rows of several pairs (`types.PairBatch.segment`): what belongs to each pair. Nothing here crosses from device to device."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mmalign_jax import mesh
from mmalign_jax.types import BY_SLOT, FILLERS, FIRST_ANSWER, PREFIX, PairBatch


def answer_sums(values: Float[Array, "C K R"], batch: PairBatch) -> Float[Array, "B K"]:
    """Sums over the tokens of every pair's answers, of values that are 0 off them."""
    if batch.place is None:
        return jnp.sum(values, axis=-1)
    pairs = batch.place.shape[-1]
    own = batch.by_answer(batch.segment)[..., None] == jnp.arange(pairs)
    return _of_pairs(jnp.sum(jnp.where(own, values[..., None], 0.0), axis=2).swapaxes(1, 2), batch.place)


def one_a_row(batch: PairBatch) -> PairBatch:
    """The same pairs `[B]`, each in a row of its own, as long as the longest takes, which shares its device's pictures."""
    if batch.place is None:
        return batch
    prefix_slots, answer_slots = batch.longest
    pairs = batch.place.shape[-1]
    answers, (p, r) = batch.answers, (batch.prefix_slots, batch.answer_slots)
    regions = [(PREFIX, 0, p, prefix_slots)]
    regions += [(FIRST_ANSWER + k, p + k * r, r, answer_slots) for k in range(answers)]
    number = jnp.broadcast_to(jnp.arange(pairs), (batch.tokens.shape[0], pairs))
    number = mesh.constrain(number, "batch", None)
    takes = []
    for role, start, length, wanted in regions:
        inside = slice(start, start + length)
        own = (batch.segment[:, None, inside] == number[..., None]) & (batch.role[:, None, inside] == role)
        first, count = jnp.argmax(own, axis=-1), jnp.sum(own, axis=-1)
        offset = jnp.arange(wanted)
        slot = jnp.minimum(start + first[..., None] + offset, batch.tokens.shape[1] - 1)
        takes.append((slot, offset < count[..., None]))
    slot, there = (jnp.concatenate(parts, axis=-1) for parts in zip(*takes, strict=True))  # C S T

    def moved(name: str, values: Array) -> Array:
        spread = jnp.broadcast_to(values[:, None], (values.shape[0], pairs, values.shape[1]))
        found = jnp.take_along_axis(mesh.constrain(spread, "batch", None, None), slot, axis=2)
        return _of_pairs(jnp.where(there, found, jnp.asarray(FILLERS.get(name, 0), values.dtype)), batch.place)

    found = {name: moved(name, value) for name in BY_SLOT if name != "segment" and (value := getattr(batch, name)) is not None}
    picture = jnp.zeros_like(batch.place)
    slots = {"prefix_slots": prefix_slots, "answer_slots": answer_slots, "longest": None}
    return dataclasses.replace(batch, **found, **slots, segment=None, place=None, turn=None, picture=picture)


def _of_pairs(values: Array, place: Int[Array, "groups pairs"]) -> Array:
    """`[C, pairs, X]`, by row and segment, as `[B, X]`, by pair."""
    (groups, pairs), (rows, _, width) = place.shape, values.shape
    grouped = mesh.reshape(values, (groups, rows // groups * pairs, width), "batch", None, None)
    taken = jax.vmap(lambda own, index: own[index])(grouped, place)
    return mesh.reshape(taken, (groups * pairs, width), "batch", None)
