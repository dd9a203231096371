"""The picture among others on one canvas (MIA-DPO): one image in, one out."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from mmalign_jax.pairs.views.replace import other_image
from mmalign_jax.pairs.views.resample import resize_weights, separable
from mmalign_jax.pairs.views.source import Source

_INSET = 0.7  # height and width of the picture in the picture, as a share (MIA-DPO's release)


def collage(source: Source, layout: str = "grid") -> Float32[Array, "B M Y W 3"]:
    """Shrinks the picture and puts it beside or onto another example's (MIA-DPO, arXiv 2410.17637, grid collage and pic-in-pic).

    MIA-DPO writes new pictures of any size, with labels that its prompts name; here the size of the picture, and so the number of its
    image tokens, stays. Its third format, a sequence of pictures, has more images and is no view of one.

    Args:
      layout: "grid", a random cell of 2 x 2 holds the picture, the other three hold the other one each; or "pip", the picture in 0.7 of
        its height and width at a random place on the other one (MIA-DPO's release: in the middle).
    """
    place = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (2,))))(source.keys)
    return _grid(source, place) if layout == "grid" else _inset(source, place)


def _grid(source: Source, place: Float32[Array, "B M 2"]) -> Float32[Array, "B M Y W 3"]:
    first = jnp.maximum((source.extent + 1) // 2, 1)  # height and width of the upper left cell
    rows, columns = (_twice(size, source.extent[..., axis], first[..., axis]) for axis, size in enumerate(source.size))
    down, across = ((jnp.arange(size) >= first[..., axis, None]) == (place[..., axis, None] >= 0.5) for axis, size in enumerate(source.size))
    own, other = separable(source.pixels, rows, columns), separable(other_image(source), rows, columns)
    return jnp.where((down[..., :, None] & across[..., None, :])[..., None], own, other)


def _twice(size: int, length: Int[Array, "B M"], first: Int[Array, "B M"]) -> Float32[Array, "B M {size} {size}"]:
    """Weights that show an axis twice, in its first pixels and in the rest."""
    before = resize_weights(size, length, first)
    behind = resize_weights(size, length, jnp.maximum(length - first, 1), at=first)
    return jnp.where(jnp.arange(size)[:, None] < first[..., None, None], before, behind)


def _inset(source: Source, place: Float32[Array, "B M 2"]) -> Float32[Array, "B M Y W 3"]:
    inset = jnp.maximum(jnp.round(_INSET * source.extent).astype(jnp.int32), 1)
    free = source.extent - inset
    start = jnp.minimum((place * (free + 1)).astype(jnp.int32), free)
    weights = (resize_weights(size, source.extent[..., axis], inset[..., axis], at=start[..., axis]) for axis, size in enumerate(source.size))
    down, across = (
        (jnp.arange(size) >= start[..., axis, None]) & (jnp.arange(size) < (start + inset)[..., axis, None]) for axis, size in enumerate(source.size)
    )
    return jnp.where((down[..., :, None] & across[..., None, :])[..., None], separable(source.pixels, *weights), other_image(source))
