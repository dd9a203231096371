"""Packed rows without a model: random queries, keys and values, with padding behind each part of a row."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from mmalign_jax.models.attention import Regions
from mmalign_jax.models.presets import preset
from mmalign_jax.types import FIRST_ANSWER, PAD, PREFIX

# no multiple of a block, padding behind each part, and a row unlike the other
REGIONS, USED = Regions(150, 70, causal=True), ((131, 70, 33), (150, 1, 68))
HEADS, GROUPS = 4, 2


def config(**changes):
    return dataclasses.replace(preset("llava-1.5-7b").decoder, heads=HEADS, kv_heads=GROUPS, **changes)


def rows(regions, used, width):
    """Queries, keys, values, and the rows' roles and positions."""
    answers = len(used[0]) - 1
    role, positions = np.full((2, len(used), regions.prefix + answers * regions.answer), PAD)
    for row, (prefix, *lengths) in enumerate(used):
        role[row, :prefix], positions[row, :prefix] = PREFIX, np.arange(prefix)
        for number, length in enumerate(lengths):
            here = regions.prefix + number * regions.answer + np.arange(length)
            role[row, here], positions[row, here] = FIRST_ANSWER + number, prefix + np.arange(length)
    random = np.random.default_rng(0)
    shape = lambda heads: (*role.shape, heads, width)  # noqa: E731
    qkv = tuple(jnp.array(random.normal(size=shape(heads)), jnp.float32) for heads in (HEADS, GROUPS, GROUPS))
    return qkv, jnp.array(role), jnp.array(positions)
