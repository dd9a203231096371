"""Low-rank factors in the parameter tree: leaves `lora_a` and `lora_b` beside a kernel, stacked over layers as it is."""

import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mmalign_jax.models.config import LORA_A, LORA_B, Lora, MllmConfig
from mmalign_jax.models.params import abstract_params
from mmalign_jax.models.tree import LeafPath, split


def is_factor(path: LeafPath) -> bool:
    return path[-1] in (LORA_A, LORA_B)


def abstract_factors(config: MllmConfig) -> dict:
    """The factors of a model as shapes, in the tree's form: without the parts and linears that have none."""
    return split(abstract_params(config), is_factor)[0]


def initial_factors(config: MllmConfig, seed: int, shardings: Mapping | None = None, dtype: Any = np.float32) -> dict:
    """New factors: A uniform within 1 / sqrt(fan in), which is PEFT's default, and B zero, so that they add nothing.

    Every leaf depends on the seed and its own path alone: not on the mesh, nor on what else is adapted.

    Args:
      shardings: of the whole tree; None puts every leaf on the default device.
    """

    def leaf(path: tuple, shape: jax.ShapeDtypeStruct) -> jax.Array:
        names = tuple(key.key for key in path)
        if names[-1] == LORA_B:
            values = np.zeros(shape.shape, dtype)
        else:
            layers = shape.shape[0] if "layers" in names else 1
            bound = math.sqrt(layers / math.prod(shape.shape[:-1]))
            generator = np.random.default_rng([seed, zlib.crc32("/".join(names).encode())])
            values = generator.uniform(-bound, bound, shape.shape).astype(dtype)
        if shardings is None:
            return jax.device_put(values)
        sharding = shardings
        for name in names:
            sharding = sharding[name]
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return jax.tree_util.tree_map_with_path(leaf, abstract_factors(config))


def merged_kernel(kernel: Any, first: Any, second: Any, scale: float) -> np.ndarray:
    """kernel + scale A B in float32 on the host: of one layer, or of a stack of layers."""
    kernel, first, second = (np.asarray(leaf, np.float32) for leaf in (kernel, first, second))
    if first.ndim + second.ndim - 2 > kernel.ndim:
        return np.stack([merged_kernel(*layer, scale) for layer in zip(kernel, first, second, strict=True)])
    return kernel + np.float32(scale) * np.tensordot(first, second, axes=1)


def merge_factors(params: Mapping[str, Any], lora: Mapping[str, Lora]) -> dict:
    """The tree of a model without adapter that computes the same: every factor added to its kernel, in float32."""
    return {part: _merge(tree, lora[part].scale) if part in lora else tree for part, tree in params.items()}


def _merge(tree: Mapping[str, Any], scale: float) -> dict:
    out = {key: _merge(value, scale) if isinstance(value, Mapping) else value for key, value in tree.items()}
    if LORA_A in out:
        out["kernel"] = merged_kernel(out["kernel"], out.pop(LORA_A), out.pop(LORA_B), scale)
    return out
