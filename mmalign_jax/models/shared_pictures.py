"""Rows that share their pictures: encoded once, read by each row (`types.PairBatch.picture`). Nothing here crosses from device to device."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mmalign_jax import mesh
from mmalign_jax.types import PairBatch


def of_rows(values: Array, picture: Int[Array, "groups rows"] | None) -> Array:
    """`[I, ...]`, one a set of pictures, as `[B, ...]`, one a row."""
    if picture is None:
        return values
    groups, rows = picture.shape
    rest, blank = values.shape[1:], (None,) * (values.ndim - 1)
    grouped = mesh.reshape(values, (groups, values.shape[0] // groups, *rest), "batch", None, *blank)
    taken = jax.vmap(lambda own, index: own[index])(grouped, picture)
    return mesh.reshape(taken, (groups * rows, *rest), "batch", *blank)


def at_tokens(features: Float[Array, "I F U"], image_index: Int[Array, "B T"], picture: Int[Array, "groups rows"] | None) -> Float[Array, "B T U"]:
    """The feature that lands on each token; where none does (`image_index` -1), the row's first."""
    index = jnp.maximum(image_index, 0)
    if picture is None:
        return jnp.take_along_axis(features, index[..., None], axis=1)
    (count, held, width), (groups, rows), slots = features.shape, picture.shape, image_index.shape[1]
    index = mesh.reshape(index, (groups, rows, slots), "batch", None, None) + picture[..., None] * held
    index = mesh.reshape(index, (groups, rows * slots, 1), "batch", None, None)
    grouped = mesh.reshape(features, (groups, count // groups * held, width), "batch", None, None)
    return mesh.reshape(jnp.take_along_axis(grouped, index, axis=1), (groups * rows, slots, width), "batch", None, None)


def with_own_pictures(batch: PairBatch) -> PairBatch:
    """The rows `[B]`, each with pictures of its own: what is drawn for a row must not be seen by another."""
    if batch.picture is None:
        return batch
    held = (batch.images, batch.patches, batch.features)
    images, patches, features = jax.tree.map(lambda values: of_rows(values, batch.picture), held)
    return dataclasses.replace(batch, images=images, patches=patches, features=features, picture=None)
