"""How much a pair counts because of who could have written it."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from mmalign_jax.losses.branches import Need
from mmalign_jax.losses.stats import BranchStats


@dataclasses.dataclass(frozen=True)
class Trust:
    """exp of both answers' mean of log pi(y_t) - log sum_v pi(v)^2: pairs count as much as the policy would have written them
    (WPO, arXiv 2406.11827, section 3.2).

    Args:
      capped: at most 1, as the authors' code; the paper's weight may be larger.
    """

    capped: bool = True
    needs: ClassVar[frozenset[Need]] = frozenset({Need.COLLISION})

    def __call__(self, stats: BranchStats) -> Float[Array, " B"]:
        lengths = jnp.where(stats.answers.lengths > 0, stats.answers.lengths, 1.0)
        weight = jnp.exp(jnp.sum((stats.answers.policy - stats.collision) / lengths, axis=-1))
        return jnp.minimum(weight, 1.0) if self.capped else weight
