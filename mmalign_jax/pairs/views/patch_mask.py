"""Square patches hidden at random (OPA-DPO)."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from mmalign_jax.pairs.views.keys import draw_grid
from mmalign_jax.pairs.views.source import Source


def patch_mask(source: Source, p: float = 0.3, patch: int = 14) -> Float32[Array, "B M Y W 3"]:
    """Paints a share `p` of the picture's patches in its mean colour (OPA-DPO, arXiv 2501.09695: 30 %, 14 pixels).

    Exactly the share, to the nearest whole patch. Patches are counted from the upper left corner; those at the right and lower border may
    be smaller. OPA-DPO's release paints with the one mean of all normalised channels, a grey near the processor's mean colour.
    """
    height, width = source.size
    area = (source.extent[..., 0] * source.extent[..., 1]).astype(jnp.float32)
    mean = jnp.sum(source.pixels, axis=(2, 3)) / area[..., None]
    hidden = jnp.repeat(jnp.repeat(_hidden(source, p, patch), patch, axis=2), patch, axis=3)[:, :, :height, :width, None]
    return jnp.where(hidden, mean[:, :, None, None], source.pixels)


def _hidden(source: Source, p: float, patch: int) -> Bool[Array, "B M _ _"]:
    """Which patches of the canvas are hidden: those of the lowest draws among the picture's."""
    down, across = (-(-size // patch) for size in source.size)
    draws = draw_grid(jax.random.uniform, source.keys, down, across)
    there = (source.extent + patch - 1) // patch
    ours = (jnp.arange(down)[:, None] < there[..., :1, None]) & (jnp.arange(across) < there[..., 1:, None])
    count = jnp.round(p * there[..., 0] * there[..., 1])

    def lowest(draws, ours, count):
        # a stable sort, so that equal draws do not change the number
        rank = jnp.argsort(jnp.argsort(jnp.where(ours, draws, jnp.inf).ravel()))
        return (rank < count).reshape(draws.shape)

    return jax.vmap(jax.vmap(lowest))(draws, ours, count)
