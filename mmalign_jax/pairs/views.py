"""Corrupted views of images. A view is drawn once a row and step; policy and reference are given the same one."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Key, UInt, UInt8

from mmalign_jax import mesh

_TRIES = 10


def row_keys(seed_key: Key[Array, ""], record_key: UInt[Array, " B"], epoch: int | Int[Array, ""]) -> Key[Array, " B"]:
    """A key for each row that depends on the seed, the row's record and the epoch (or step) alone, not on the batch or the mesh."""
    return jax.vmap(lambda key: jax.random.fold_in(jax.random.fold_in(seed_key, key), epoch))(record_key)


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
      keys: one a row, see `row_keys`.
      scale: range of the crop's area, as a share of the image's.
      ratio: range of the crop's width / height.
      extent: height and width of the picture in the upper left corner of each canvas, in pixels; None: it fills the canvas.
    """
    rows, count, height, width, _ = images.shape
    if extent is None:
        extent = jnp.broadcast_to(jnp.array([height, width]), (rows, count, 2))
    image_keys = jax.vmap(lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count)))(keys)
    extent = mesh.constrain(jnp.maximum(extent, 1), "batch", None, None)
    boxes = jax.vmap(jax.vmap(lambda key, size: crop_box(key, size[0], size[1], scale, ratio)))(image_keys, extent)
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
    blend the box's neighbours into the border.) With `extent` it is enlarged to that size, in the upper left corner.
    """
    _, _, height, width, _ = images.shape
    boxes = mesh.constrain(boxes, "batch", None, None)
    rows = _interpolation(boxes[..., 0], boxes[..., 2], height, None if extent is None else extent[..., 0])
    columns = _interpolation(boxes[..., 1], boxes[..., 3], width, None if extent is None else extent[..., 1])
    # pixels in 0..255 need more than bfloat16's eight bits
    precision = jax.lax.Precision.HIGHEST
    out = jnp.einsum("bmyi,bmijc->bmyjc", rows, images.astype(jnp.float32), precision=precision)
    out = jnp.einsum("bmwj,bmyjc->bmywc", columns, out, precision=precision)
    if images.dtype == jnp.uint8:
        return jnp.clip(jnp.round(out), 0, 255).astype(jnp.uint8)
    return out


def _interpolation(
    start: Int[Array, "B M"], length: Int[Array, "B M"], size: int, extent: Int[Array, "B M"] | None
) -> Float32[Array, "B M {size} {size}"]:
    """Weights [output, input] that enlarge pixels start .. start + length - 1 of an axis to its first `extent` pixels; centres are at 0.5."""
    length = length[..., None].astype(jnp.float32)
    wanted = size if extent is None else extent[..., None]
    centre = (jnp.arange(size) + 0.5) * length / wanted - 0.5
    source = start[..., None] + jnp.clip(centre, 0, length - 1)
    return jnp.maximum(0.0, 1.0 - jnp.abs(source[..., None] - jnp.arange(size)))


def _central_box(height: int | Int[Array, ""], width: int | Int[Array, ""], ratio: tuple[float, float]) -> Int[Array, "4"]:
    h = jnp.minimum(height, jnp.maximum(1, jnp.round(width / ratio[0]).astype(jnp.int32)))
    w = jnp.minimum(width, jnp.maximum(1, jnp.round(height * ratio[1]).astype(jnp.int32)))
    return jnp.stack([(height - h) // 2, (width - w) // 2, h, w]).astype(jnp.int32)
