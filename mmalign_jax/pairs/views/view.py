"""A view of images: which one, with which arguments, and how it is applied."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Key, UInt8

from mmalign_jax.pairs.calls import Value
from mmalign_jax.pairs.views.keys import image_keys, view_keys
from mmalign_jax.pairs.views.source import Source, full_extent, onto_canvas, to_pixels
from mmalign_jax.pairs.views.table import BY_NAME, Kind

Images = UInt8[Array, "B M Y W 3"] | Float[Array, "B M Y W 3"]


@dataclasses.dataclass(frozen=True)
class View:
    """A corrupted view of images, made by `parse`. It is static and hashable: close over it, do not pass it through jit.

    Args:
      name: its kind, one of `names()`.
      arguments: every argument of the kind, with its value, in the kind's order.
    """

    name: str
    arguments: tuple[tuple[str, Value], ...] = ()

    @property
    def _kind(self) -> Kind:
        return BY_NAME[self.name]

    @property
    def random(self) -> bool:
        """Whether anything is drawn. What was computed under such a view (a cached reference) belongs to the draw."""
        return self._kind.random

    @property
    def needs(self) -> frozenset[str]:
        """What `apply` must be given besides: "other_images", "features"."""
        return self._kind.needs

    @property
    def tower_gradients(self) -> int:
        """How often `apply` computes features and the gradient of their images."""
        return int(dict(self.arguments)["steps"]) if "features" in self.needs else 0

    @property
    def float_pixels(self) -> bool:
        """Whether rounding to whole levels changes what the view is; give it float32 pixels, then nothing is rounded or clipped."""
        return self._kind.float_pixels

    def __str__(self) -> str:
        """The text with all arguments named, defaults too: `parse` reads it, equal views write it equally, cache keys hold it."""
        return f"{self.name}({','.join(f'{name}={value}' for name, value in self.arguments)})" if self.arguments else self.name

    def apply(
        self,
        images: Images,
        keys: Key[Array, " B"],
        *,
        extent: Int[Array, "B M 2"] | None = None,
        other_images: Images | None = None,
        other_extent: Int[Array, "B M 2"] | None = None,
        features: Callable[[Float32[Array, "B M Y W 3"]], Float[Array, "B F Z"]] | None = None,
        target: Float[Array, "B F Z"] | None = None,
        pixel_mean: tuple[float, float, float] | None = None,
        pixel_std: tuple[float, float, float] | None = None,
    ) -> UInt8[Array, "B M Y W 3"] | Float32[Array, "B M Y W 3"]:
        """The view of every image, of the same number and size. Each image of a row has its own draw, each tile and each frame too.

        The result depends on the row, its key and the view's name, not on the batch, its order, the mesh or the canvas' size. Policy and
        reference must be given the same result: apply it once. Nothing outside of a picture's extent is read, and it stays as it was.

        Args:
          images: pixels in 0..255. uint8 gives uint8, rounded and clipped (float32 where the view is adversarial); a float type gives
            float32, neither rounded nor clipped. A training step gives float32 to views with `float_pixels`.
          keys: one a row, see `row_keys`; the view's name is folded in.
          extent: height and width of the picture in the upper left corner of each canvas, in pixels, 0 for none; None: it fills it.
          other_images: for views that need them, the pixels of another example for each row; its pictures lie in `other_extent`, by
            default in canvases filled as the row's own.
          features: for views that need them, the tower: images -> features of its own row alone. Pixels are 0 outside of the pictures.
          target: the features to go away from; by default those of `images` under `features`.
          pixel_mean, pixel_std: the processor's normalisation of pixels in [0, 1], for noise in normalised space.

        Raises:
          ValueError: something that the view needs is missing.
        """
        given = {"other_images": other_images, "features": features}
        if missing := sorted(name for name in self.needs if given[name] is None):
            raise ValueError(f"{self} needs {', '.join(missing)}")
        if dict(self.arguments).get("space") == "normalised" and (pixel_mean is None or pixel_std is None):
            raise ValueError(f"{self} needs pixel_mean and pixel_std, the processor's normalisation")
        extent = full_extent(images, extent)
        other_extent = extent if other_extent is None else full_extent(images, other_extent)
        source = Source(
            pixels=to_pixels(images, extent),
            extent=jnp.maximum(extent, 1),  # of no picture, nothing is kept below
            keys=image_keys(view_keys(keys, self.name), images.shape[1]),
            other_pixels=None if other_images is None else to_pixels(other_images, other_extent),
            other_extent=other_extent,
            features=features,
            target=target,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
        )
        out = self._kind.function(source, **dict(self.arguments))
        return onto_canvas(out, images, extent, self._kind.always_float)
