"""Random changes of a picture's colours, as torchvision's ColorJitter."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

from mmalign_jax.pairs.views.source import Source

_GREY = (0.2989, 0.587, 0.114)  # torchvision's


def colour_jitter(
    source: Source, brightness: float = 0.5, contrast: float = 0.0, saturation: float = 0.0, hue: float = 0.3
) -> Float32[Array, "B M Y W 3"]:
    """Changes brightness, contrast, saturation and hue of every image by random factors (STIC, arXiv 2405.19716: brightness 0.5, hue 0.3).

    The factors are torchvision's: uniform in [max(0, 1 - amount), 1 + amount], the turn of the hue in [-hue, hue] of the circle. The
    order is always brightness, contrast, saturation, hue; torchvision draws it. Each of them clips to 0..255; an amount of 0 leaves it out.
    """
    uniform = jax.vmap(jax.vmap(lambda key: jax.random.uniform(key, (4,))))(source.keys)

    def factor(place: int, amount: float) -> Float32[Array, "B M"]:
        low = max(0.0, 1 - amount)
        return low + (1 + amount - low) * uniform[..., place]

    out = source.pixels
    if brightness:
        out = adjust_brightness(out, factor(0, brightness))
    if contrast:
        out = adjust_contrast(out, factor(1, contrast), source)
    if saturation:
        out = adjust_saturation(out, factor(2, saturation))
    if hue:
        out = adjust_hue(out, hue * (2 * uniform[..., 3] - 1))
    return out


def adjust_brightness(pixels: Float32[Array, "B M Y W 3"], factor: Float32[Array, "B M"]) -> Float32[Array, "B M Y W 3"]:
    return _blend(pixels, jnp.zeros_like(pixels), factor)


def adjust_contrast(pixels: Float32[Array, "B M Y W 3"], factor: Float32[Array, "B M"], source: Source) -> Float32[Array, "B M Y W 3"]:
    """Blends with the mean grey of the picture."""
    grey = jnp.where(source.inside, _grey(pixels), 0.0)
    area = source.extent[..., 0] * source.extent[..., 1]
    return _blend(pixels, (jnp.sum(grey, axis=(2, 3, 4)) / area)[..., None, None, None], factor)


def adjust_saturation(pixels: Float32[Array, "B M Y W 3"], factor: Float32[Array, "B M"]) -> Float32[Array, "B M Y W 3"]:
    """Blends with the grey picture."""
    return _blend(pixels, _grey(pixels), factor)


def adjust_hue(pixels: Float32[Array, "B M Y W 3"], turn: Float32[Array, "B M"]) -> Float32[Array, "B M Y W 3"]:
    """Turns the hue by a part of the circle, through HSV."""
    pixels = jnp.clip(pixels, 0, 255)
    red, green, blue = (pixels[..., i] for i in range(3))
    value, least = jnp.max(pixels, axis=-1), jnp.min(pixels, axis=-1)
    chroma = value - least
    unit = jnp.where(chroma > 0, chroma, 1.0)
    # by order and never by `value == red`: XLA may compute the pixels twice, rounded differently, and no channel would be equal
    reddest, greenest = (red >= green) & (red >= blue), green >= blue
    sector = jnp.where(reddest, (green - blue) / unit, jnp.where(greenest, 2 + (blue - red) / unit, 4 + (red - green) / unit))
    hue = sector + 6 * turn[..., None, None]
    # the channels of a hue (in sixths of the circle) at full value: one plateau of two sixths each, sloping to both sides
    distance = jnp.stack([(hue + shift) % 6 for shift in (5, 3, 1)], axis=-1)
    share = jnp.clip(jnp.minimum(distance, 4 - distance), 0, 1)
    return value[..., None] - chroma[..., None] * share


def _grey(pixels: Float32[Array, "B M Y W 3"]) -> Float32[Array, "B M Y W 1"]:
    return sum(weight * pixels[..., i : i + 1] for i, weight in enumerate(_GREY))


def _blend(pixels: Float32[Array, "B M Y W 3"], other: Float32[Array, "B M #Y #W #C"], factor: Float32[Array, "B M"]) -> Float32[Array, "B M Y W 3"]:
    factor = factor[..., None, None, None]
    return jnp.clip(factor * pixels + (1 - factor) * other, 0, 255)
