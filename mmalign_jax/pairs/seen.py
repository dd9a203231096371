"""Image features of what the policy sees: the pictures, or a view of them."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

from mmalign_jax.models.mllm import Mllm
from mmalign_jax.pairs.views import View
from mmalign_jax.types import Patches


def encode_seen(
    model: Mllm, view: View | None, params: dict, images: UInt8[Array, "B M Y W 3"], patches: Patches | None, keys: Key[Array, " B"]
) -> Float[Array, "B F U"]:
    """The features of each row's pictures under the view, drawn with the row's key; of the pictures themselves where there is none."""
    if view is None:
        return model.encode_images(params, images, patches)
    pixels = images.astype(jnp.float32) if view.float_pixels else images
    extent = None if patches is None else patches.extent
    seen = view.apply(pixels, keys, extent=extent, pixel_mean=model.pixel_mean, pixel_std=model.pixel_std)
    return model.encode_images(params, seen, patches)
