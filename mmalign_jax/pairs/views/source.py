"""What a view is made from, and what all views share: pixel types, and the canvas around a picture."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Key, UInt8

from mmalign_jax import mesh


@dataclasses.dataclass(frozen=True)
class Source:
    """Rows of pictures, in the form in which the function of a view takes them. It lives within one trace.

    `View.apply` makes it, and cares for types and canvases: a view's function takes and returns float32 pixels in 0..255, may return what
    it likes outside of the pictures, and is not rounded.
    """

    pixels: Float32[Array, "B M Y W 3"]  # 0 outside of the pictures
    extent: Int[Array, "B M 2"]  # height and width of each picture, at least 1
    keys: Key[Array, "B M"]
    other_pixels: Float32[Array, "B M Y W 3"] | None = None  # of another example, 0 outside of its pictures
    other_extent: Int[Array, "B M 2"] | None = None
    features: Callable[[Float32[Array, "B M Y W 3"]], Float[Array, "B F Z"]] | None = None
    target: Float[Array, "B F Z"] | None = None
    pixel_mean: tuple[float, float, float] | None = None  # the processor's normalisation of pixels in [0, 1]
    pixel_std: tuple[float, float, float] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the canvases."""
        return self.pixels.shape[2], self.pixels.shape[3]

    @property
    def inside(self) -> Bool[Array, "B M Y W 1"]:
        return inside(self.extent, *self.size)


def full_extent(images: UInt8[Array, "B M Y W 3"] | Float[Array, "B M Y W 3"], extent: Int[Array, "B M 2"] | None) -> Int[Array, "B M 2"]:
    """The extent of the pictures; without one they fill their canvases."""
    if extent is None:
        rows, count, height, width, _ = images.shape
        extent = jnp.broadcast_to(jnp.array([height, width]), (rows, count, 2))
    return mesh.constrain(extent, "batch", None, None)


def inside(extent: Int[Array, "B M 2"], height: int, width: int) -> Bool[Array, "B M {height} {width} 1"]:
    """Which pixels of a canvas are a picture's: those of its upper left corner."""
    down = jnp.arange(height) < extent[..., :1]
    across = jnp.arange(width) < extent[..., 1:]
    return (down[..., :, None] & across[..., None, :])[..., None]


def to_pixels(images: UInt8[Array, "B M Y W 3"] | Float[Array, "B M Y W 3"], extent: Int[Array, "B M 2"]) -> Float32[Array, "B M Y W 3"]:
    """Float32 pixels, 0 outside of the pictures, whatever lies there."""
    return jnp.where(inside(extent, *images.shape[2:4]), images.astype(jnp.float32), 0.0)


def onto_canvas(
    pixels: Float32[Array, "B M Y W 3"],
    images: UInt8[Array, "B M Y W 3"] | Float[Array, "B M Y W 3"],
    extent: Int[Array, "B M 2"],
    as_float: bool,
) -> UInt8[Array, "B M Y W 3"] | Float32[Array, "B M Y W 3"]:
    """The view's `pixels` within the pictures, the canvas as it was around them.

    Args:
      as_float: keep float32; otherwise pixels of uint8 images are rounded and clipped to 0..255.
    """
    if images.dtype == jnp.uint8 and not as_float:
        pixels = jnp.clip(jnp.round(pixels), 0, 255).astype(jnp.uint8)
    return jnp.where(inside(extent, *images.shape[2:4]), pixels, images.astype(pixels.dtype))
