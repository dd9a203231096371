"""Views that keep the picture whole, or put another in its place: identity, black, other_image."""

import jax.numpy as jnp
from jaxtyping import Array, Float32

from mmalign_jax.pairs.views.resample import resize_weights, separable
from mmalign_jax.pairs.views.source import Source


def identity(source: Source) -> Float32[Array, "B M Y W 3"]:
    """The picture as it is."""
    return source.pixels


def black(source: Source) -> Float32[Array, "B M Y W 3"]:
    """All pixels 0: the null image of V-DPO (arXiv 2411.02712).

    CHiP's image type "black" is zeros *after* normalisation, so the processor's mean colour and not black.
    """
    return jnp.zeros_like(source.pixels)


def other_image(source: Source) -> Float32[Array, "B M Y W 3"]:
    """The picture of another example (CHiP's and mDPO's "random image").

    It is brought to the size of the row's own, because its image tokens take their places: bilinear, antialiased, untouched where the
    sizes agree. Where the other example has no picture, the result is black.
    """
    height, width = source.size
    there = jnp.maximum(source.other_extent, 1)
    rows = resize_weights(height, there[..., 0], source.extent[..., 0])
    columns = resize_weights(width, there[..., 1], source.extent[..., 1])
    return separable(source.other_pixels, rows, columns)
