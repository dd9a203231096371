"""Sorting over all rows of a batch, which under a mesh lie on several devices."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from mmalign_jax import mesh

PerPair = Float[Array, "B *_more"]


def gathered(function: Callable[[PerPair], PerPair], x: PerPair) -> PerPair:
    """`function(x)`, for functions that want the whole batch in one place, as a sort does. The result is sharded as `x` is."""
    if not mesh.active():
        return function(x)
    return jax.sharding.reshard(function(jax.sharding.reshard(x, mesh.spec(None))), jax.typeof(x).sharding.spec)
