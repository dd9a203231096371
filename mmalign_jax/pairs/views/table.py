"""The table of views: name, function, what it takes. A new view is one entry here and one function."""

import dataclasses
from collections.abc import Callable

from mmalign_jax.pairs.calls import Choice, Number
from mmalign_jax.pairs.views.adversarial import pgd
from mmalign_jax.pairs.views.blur import gaussian_blur, low_resolution, pixelate
from mmalign_jax.pairs.views.collage import collage
from mmalign_jax.pairs.views.colour import colour_jitter
from mmalign_jax.pairs.views.crop import random_crop
from mmalign_jax.pairs.views.diffusion import STEPS, diffusion
from mmalign_jax.pairs.views.patch_mask import patch_mask
from mmalign_jax.pairs.views.replace import black, identity, other_image


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of view.

    Args:
      name: what users write.
      function: `(source, **arguments) -> pixels`, see `source.Source`.
      arguments: in the order in which they may be given without names.
      random: something is drawn.
      needs: what `View.apply` must be given besides: "other_images", "features".
      float_pixels: rounded to whole levels the view is not what its paper says; give it float pixels.
      always_float: it returns float32 for uint8 images, too.
    """

    name: str
    function: Callable
    arguments: tuple[Number | Choice, ...] = ()
    random: bool = False
    needs: frozenset[str] = frozenset()
    float_pixels: bool = False
    always_float: bool = False


OTHER, FEATURES = frozenset({"other_images"}), frozenset({"features"})

KINDS = (
    Kind("identity", identity),
    Kind("black", black),
    Kind("other_image", other_image, needs=OTHER),
    Kind(
        "random_crop",
        random_crop,
        (
            Number("scale_min", 0.01, low=1e-4, high=1),
            Number("scale_max", 0.20, low=1e-4, high=1, not_below="scale_min"),
            Number("ratio_min", 3 / 4, low=0.01, high=100),
            Number("ratio_max", 4 / 3, low=0.01, high=100, not_below="ratio_min"),
        ),
        random=True,
    ),
    Kind(
        "diffusion",
        diffusion,
        (Number("t", 500, low=0, high=STEPS - 1), Choice("space", "normalised", ("normalised", "pixel"))),
        random=True,
        float_pixels=True,
    ),
    Kind("gaussian_blur", gaussian_blur, (Number("sigma", 8.0, low=0.1, high=200),)),
    Kind("pixelate", pixelate, (Number("block", 16, low=1, high=4096),)),
    Kind("low_resolution", low_resolution, (Number("side", 20, low=1, high=4096),)),
    Kind(
        "colour_jitter",
        colour_jitter,
        (
            Number("brightness", 0.5, low=0, high=10),
            Number("contrast", 0.0, low=0, high=10),
            Number("saturation", 0.0, low=0, high=10),
            Number("hue", 0.3, low=0, high=0.5),
        ),
        random=True,
    ),
    Kind("patch_mask", patch_mask, (Number("p", 0.3, low=0, high=1), Number("patch", 14, low=1, high=4096)), random=True),
    Kind("collage", collage, (Choice("layout", "grid", ("grid", "pip")),), random=True, needs=OTHER),
    Kind(
        "pgd",
        pgd,
        (Number("eps", 2.0, low=0, high=255), Number("steps", 10, low=1, high=1000)),
        random=True,
        needs=FEATURES,
        float_pixels=True,
        always_float=True,
    ),
)

BY_NAME = {kind.name: kind for kind in KINDS}
