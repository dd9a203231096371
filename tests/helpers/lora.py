"""A tiny model with low-rank factors."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from helpers.tiny import Tiny

from mmalign_jax.models.config import Lora, MllmConfig
from mmalign_jax.models.lora import abstract_factors


def adapted(tiny: Tiny, lora: Mapping[str, Lora]) -> Tiny:
    """The same model with places for factors. Its `params` are still the base's."""
    sizes = tiny.config.with_lora(lora)
    return dataclasses.replace(tiny, config=sizes, model=dataclasses.replace(tiny.model, config=sizes))


def random_factors(sizes: MllmConfig, seed: int = 0, size: float = 0.2) -> dict:
    """Factors as they are after training: neither of the two is zero."""
    generator = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(size * generator.normal(size=leaf.shape), leaf.dtype), abstract_factors(sizes))
