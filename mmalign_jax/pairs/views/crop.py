"""A random small crop, enlarged to the image's size (mDPO)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Key, UInt8

from mmalign_jax import mesh
from mmalign_jax.pairs.views.keys import image_keys
from mmalign_jax.pairs.views.resample import resize_weights, separable
from mmalign_jax.pairs.views.source import Source, full_extent, onto_canvas, to_pixels

_TRIES = 10


def random_crop(
    source: Source, scale_min: float = 0.01, scale_max: float = 0.20, ratio_min: float = 3 / 4, ratio_max: float = 4 / 3
) -> Float32[Array, "B M Y W 3"]:
    """`random_resized_crop` as a view: a crop of scale_min .. scale_max of the area, its width / height in ratio_min .. ratio_max."""
    boxes = _boxes(source.keys, source.extent, (scale_min, scale_max), (ratio_min, ratio_max))
    return _resized(source.pixels, boxes, source.extent)


def random_resized_crop(
    images: UInt8[Array, "B M Y W 3"] | Float[Array, "B M Y W 3"],
    keys: Key[Array, " B"],
    scale: tuple[float, float] = (0.01, 0.20),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    extent: Int[Array, "B M 2"] | None = None,
) -> UInt8[Array, "B M Y W 3"] | Float32[Array, "B M Y W 3"]:
    """A random small crop of every image, enlarged to the image's size (mDPO, arXiv 2406.11839: 1 to 20 % of the area).

    The number of image tokens stays the same. Each image of a row has its own box, and so has each tile of a picture that is cut into
    tiles and each frame of a video: each then shows a small part of what it showed.

    Args:
      images: pixels; uint8 gives uint8, any float type gives float32.
      keys: one a row, see `row_keys`. The view `random_crop` draws from other keys: its name is part of them.
      scale: range of the crop's area, as a share of the image's.
      ratio: range of the crop's width / height.
      extent: height and width of the picture in the upper left corner of each canvas, in pixels; None: it fills the canvas.
    """
    extent = full_extent(images, extent)
    boxes = _boxes(image_keys(keys, images.shape[1]), jnp.maximum(extent, 1), scale, ratio)
    return resized_crop(images, boxes, extent)


def crop_box(
    key: Key[Array, ""],
    height: int | Int[Array, ""],
    width: int | Int[Array, ""],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Int[Array, "4"]:
    """Draws top, left, height and width of a crop, in pixels, as torchvision's RandomResizedCrop does.

    The area is uniform and the aspect ratio log-uniform; the first of ten draws that fits into the image counts, and when none does it
    is the central crop with the nearest aspect ratio. All ten are drawn at once, so there is no branch.
    """
    # one draw of all the numbers: a call of the generator is most of this function's compile time
    uniform = jax.random.uniform(key, (2 * _TRIES + 2,))
    area = height * width * (scale[0] + (scale[1] - scale[0]) * uniform[:_TRIES])
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** uniform[_TRIES : 2 * _TRIES]
    w = jnp.round(jnp.sqrt(area * aspect)).astype(jnp.int32)
    h = jnp.round(jnp.sqrt(area / aspect)).astype(jnp.int32)
    fits = (0 < w) & (w <= width) & (0 < h) & (h <= height)
    first = jnp.argmax(fits)
    h, w = h[first], w[first]
    places = jnp.stack([height - h, width - w]) + 1
    # the product may round up to the number of places
    top, left = jnp.minimum((uniform[-2:] * places).astype(jnp.int32), places - 1)
    return jnp.where(fits.any(), jnp.stack([top, left, h, w]), _central_box(height, width, ratio))


def resized_crop(
    images: UInt8[Array, "B M Y W 3"] | Float[Array, "B M Y W 3"], boxes: Int[Array, "B M 4"], extent: Int[Array, "B M 2"] | None = None
) -> UInt8[Array, "B M Y W 3"] | Float32[Array, "B M Y W 3"]:
    """Crops each image to its box (top, left, height, width, in pixels) and resizes the crop to the image's size, bilinearly.

    The result is that of cropping first: no pixel outside of the box is read. (`jax.image.scale_and_translate` on the whole image would
    blend the box's neighbours into the border.) With `extent` it is enlarged to that size, in the upper left corner of the canvas, and
    the rest of the canvas stays as it was.
    """
    extent = full_extent(images, extent)
    out = _resized(to_pixels(images, extent), mesh.constrain(boxes, "batch", None, None), jnp.maximum(extent, 1))
    return onto_canvas(out, images, extent, as_float=False)


def _boxes(keys: Key[Array, "B M"], extent: Int[Array, "B M 2"], scale: tuple[float, float], ratio: tuple[float, float]) -> Int[Array, "B M 4"]:
    return jax.vmap(jax.vmap(lambda key, size: crop_box(key, size[0], size[1], scale, ratio)))(keys, extent)


def _resized(pixels: Float32[Array, "B M Y W 3"], boxes: Int[Array, "B M 4"], extent: Int[Array, "B M 2"]) -> Float32[Array, "B M Y W 3"]:
    _, _, height, width, _ = pixels.shape
    rows = resize_weights(height, boxes[..., 2], extent[..., 0], start=boxes[..., 0])
    columns = resize_weights(width, boxes[..., 3], extent[..., 1], start=boxes[..., 1])
    return separable(pixels, rows, columns)


def _central_box(height: int | Int[Array, ""], width: int | Int[Array, ""], ratio: tuple[float, float]) -> Int[Array, "4"]:
    h = jnp.minimum(height, jnp.maximum(1, jnp.round(width / ratio[0]).astype(jnp.int32)))
    w = jnp.minimum(width, jnp.maximum(1, jnp.round(height * ratio[1]).astype(jnp.int32)))
    return jnp.stack([(height - h) // 2, (width - w) // 2, h, w]).astype(jnp.int32)
