"""Linear maps of an image's rows and columns: resizing, blurring and averaging are all two matrices of weights."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int


def separable(
    pixels: Float32[Array, "B M Y W 3"], rows: Float32[Array, "B M Y Y"], columns: Float32[Array, "B M W W"]
) -> Float32[Array, "B M Y W 3"]:
    """Applies weights [output, input] along both axes. As matrix products: shapes stay static where the pictures' sizes do not."""
    # pixels in 0..255 need more than bfloat16's eight bits
    precision = jax.lax.Precision.HIGHEST
    out = jnp.einsum("bmyi,bmijc->bmyjc", rows, pixels, precision=precision)
    return jnp.einsum("bmwj,bmyjc->bmywc", columns, out, precision=precision)


def resize_weights(
    size: int, length: Int[Array, "B M"], wanted: Int[Array, "B M"], *, start: int | Int[Array, "B M"] = 0, at: int | Int[Array, "B M"] = 0
) -> Float32[Array, "B M {size} {size}"]:
    """Weights that bring pixels start .. start + length - 1 of an axis to at .. at + wanted - 1, bilinear, no other pixel being read.

    Pixel centres are at 0.5. Where pixels become fewer, the triangle is as wide as they are, so nothing is skipped ("antialias", what
    Pillow does). Outputs before and behind that range repeat its ends.
    """
    length, wanted = length[..., None].astype(jnp.float32), wanted[..., None]
    scale = length / wanted
    index = jnp.clip(jnp.arange(size) - jnp.asarray(at)[..., None], 0, wanted - 1)
    centre = (index + 0.5) * scale
    place = jnp.arange(size) + 0.5 - jnp.asarray(start)[..., None]
    weight = jnp.maximum(0.0, 1.0 - jnp.abs(place[..., None, :] - centre[..., :, None]) / jnp.maximum(scale, 1.0)[..., None])
    weight = jnp.where(((place > 0) & (place < length))[..., None, :], weight, 0.0)
    return weight / jnp.sum(weight, axis=-1, keepdims=True)


def gaussian_weights(size: int, length: Int[Array, "B M"], sigma: float) -> Float32[Array, "B M {size} {size}"]:
    """Weights of a Gaussian of `sigma` pixels, cut at 4 sigma; beyond its ends an axis of `length` pixels repeats the last one."""
    radius = int(4 * sigma + 0.5)
    taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    total = taps.sum()
    offset = np.arange(size) - np.arange(size)[:, None]
    within = np.where(np.abs(offset) <= radius, np.exp(-0.5 * (offset / sigma) ** 2) / total, 0.0).astype(np.float32)
    # what falls before the first pixel and behind the last one
    reach = np.arange(-radius, radius + 1)
    before = ((taps / total) * (reach < -np.arange(size)[:, None])).sum(axis=-1).astype(np.float32)
    to_end = length[..., None, None] - 1 - jnp.arange(size)[:, None]
    behind = jnp.sum(jnp.where(reach > to_end, (taps / total).astype(np.float32), 0.0), axis=-1)
    column, length = jnp.arange(size), length[..., None, None]
    weight = within + jnp.where(column == 0, before[:, None], 0.0) + jnp.where(column == length - 1, behind[..., None], 0.0)
    return jnp.where(column < length, weight, 0.0)


def block_weights(size: int, length: Int[Array, "B M"], block: int) -> Float32[Array, "B M {size} {size}"]:
    """Weights that give each pixel the mean of its block of `block` pixels, counted from 0; the last block may be smaller."""
    number = np.arange(size) // block
    same = jnp.asarray((number[:, None] == number).astype(np.float32))
    weight = jnp.where(jnp.arange(size) < length[..., None, None], same, 0.0)
    return weight / jnp.maximum(jnp.sum(weight, axis=-1, keepdims=True), 1.0)
