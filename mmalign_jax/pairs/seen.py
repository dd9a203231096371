"""What the model sees in the place of the pictures: a view of them, and its features."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Key, UInt8

from mmalign_jax.models.mllm import Mllm
from mmalign_jax.pairs.views import View
from mmalign_jax.pairs.views.view import Images
from mmalign_jax.types import Patches


def under(
    view: View,
    model: Mllm,
    images: Images,
    patches: Patches | None,
    keys: Key[Array, " B"],
    *,
    other_images: Images | None = None,
    features: Callable[[Array], Array] | None = None,
    target: Float[Array, "B F Z"] | None = None,
) -> Images:
    """Each row's pictures under the view, drawn with the row's key; not rounded where the view is another one for that.

    Args:
      model: whose normalisation of pixels the view is told.
      other_images, features, target: for views that need them, see `View.apply`.
    """
    pixels = images.astype(jnp.float32) if view.float_pixels else images
    extent = None if patches is None else patches.extent
    statistics = {"pixel_mean": model.pixel_mean, "pixel_std": model.pixel_std}
    return view.apply(pixels, keys, extent=extent, other_images=other_images, features=features, target=target, **statistics)


def encode_seen(
    model: Mllm, view: View | None, params: dict, images: UInt8[Array, "B M Y W 3"], patches: Patches | None, keys: Key[Array, " B"]
) -> Float[Array, "B F U"]:
    """The features of each row's pictures under the view, drawn with the row's key; of the pictures themselves where there is none."""
    return model.encode_images(params, images if view is None else under(view, model, images, patches, keys), patches)
