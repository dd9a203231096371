"""Views with less detail: gaussian_blur, pixelate, low_resolution."""

import jax.numpy as jnp
from jaxtyping import Array, Float32

from mmalign_jax.pairs.views.resample import block_weights, gaussian_weights, resize_weights, separable
from mmalign_jax.pairs.views.source import Source


def gaussian_blur(source: Source, sigma: float = 8.0) -> Float32[Array, "B M Y W 3"]:
    """A Gaussian of `sigma` pixels, cut at 4 sigma, the picture's border repeated beyond it (Image-DPO, arXiv 2501.00569).

    Image-DPO does not say how strong its blur is; 4 to 10 pixels on 336 are a guess.
    """
    height, width = source.size
    rows, columns = gaussian_weights(height, source.extent[..., 0], sigma), gaussian_weights(width, source.extent[..., 1], sigma)
    return separable(source.pixels, rows, columns)


def pixelate(source: Source, block: int = 16) -> Float32[Array, "B M Y W 3"]:
    """Squares of `block` pixels, each in its mean colour, from the upper left corner (Image-DPO, arXiv 2501.00569; the size is a guess)."""
    height, width = source.size
    rows, columns = block_weights(height, source.extent[..., 0], block), block_weights(width, source.extent[..., 1], block)
    return separable(source.pixels, rows, columns)


def low_resolution(source: Source, side: int = 20) -> Float32[Array, "B M Y W 3"]:
    """Shrinks the picture's short side to `side` pixels and enlarges it again (STIC, arXiv 2405.19716: 20 pixels).

    Both ways bilinear, antialiased; the long side keeps the aspect ratio, rounded down. A picture that is smaller stays as it is.
    """
    short = jnp.min(source.extent, axis=-1, keepdims=True)
    small = jnp.maximum(jnp.minimum(side, short) * source.extent // short, 1)
    weights = []
    for axis, size in enumerate(source.size):
        down = resize_weights(size, source.extent[..., axis], small[..., axis])
        up = resize_weights(size, small[..., axis], source.extent[..., axis])
        weights.append(jnp.einsum("bmyi,bmij->bmyj", up, down, precision="highest"))
    return separable(source.pixels, *weights)
