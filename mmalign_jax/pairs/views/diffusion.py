"""Noise of a diffusion model's forward process (VCD, POVID, SeVa, CHiP)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from mmalign_jax.pairs.views.keys import draw_grid
from mmalign_jax.pairs.views.source import Source

STEPS = 1000


def strength(t: int) -> tuple[float, float]:
    """sqrt(abar_t) and sqrt(1 - abar_t), the shares of signal and noise at step `t` in 0..999 of the schedule that all four share.

    betas = sigmoid(linspace(-6, 6, 1000)) (0.5e-2 - 1e-5) + 1e-5, abar = cumprod(1 - betas).
    """
    betas = 1 / (1 + np.exp(-np.linspace(-6, 6, STEPS))) * (0.5e-2 - 1e-5) + 1e-5
    kept = np.cumprod(1 - betas)[t]
    return float(np.sqrt(kept)), float(np.sqrt(1 - kept))


def diffusion(source: Source, t: int = 500, space: str = "normalised") -> Float32[Array, "B M Y W 3"]:
    """x_t = sqrt(abar_t) x + sqrt(1 - abar_t) eps with eps ~ N(0, 1) for every pixel and channel.

    What x is decides how strong the noise is, and the published code differs:

      "normalised": (pixel / 255 - mean) / std, what the tower takes: VCD (arXiv 2311.16922), SeVa (2404.10501), CHiP (2501.16629). With
        CLIP's numbers eps is about 69 of 255 levels.
      "pixel": pixel / 255: POVID (2402.11411), before it resizes. eps is 255 levels.

    The signal shrinks towards x = 0: the processor's mean colour, or black.

    The result is not clipped. Float pixels are what the papers in normalised space train on; of uint8 images `View.apply` has to round
    and clip it, which takes away some of the noise.
    """
    signal, noise = strength(t)
    centre, unit = np.zeros(3, np.float32), np.full(3, 255.0, np.float32)
    if space == "normalised":
        centre, unit = (255.0 * np.asarray(values, np.float32) for values in (source.pixel_mean, source.pixel_std))
    eps = draw_grid(functools.partial(jax.random.normal, dtype=jnp.float32), source.keys, source.size[0], source.size[1], 3)
    return signal * source.pixels + (1 - signal) * centre + noise * unit * eps
