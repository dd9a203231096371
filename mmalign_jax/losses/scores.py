"""The score of a branch: what of its token log-probs counts, and how it is compared with the reference."""

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmalign_jax.losses.branches import Branch, Need
from mmalign_jax.losses.links import exp
from mmalign_jax.losses.stats import AnswerLogps, BranchStats

PerAnswer = Float[Array, "B K"]


@dataclasses.dataclass(frozen=True)
class Sum:
    """sum_t log pi(y_t)."""

    needs: ClassVar[frozenset[Need]] = frozenset()

    def __call__(self, sums: PerAnswer, tokens: Float[Array, "B K R"] | None, logps: AnswerLogps) -> PerAnswer:
        return sums


@dataclasses.dataclass(frozen=True)
class Mean:
    """The mean over tokens; an answer without scored tokens has mean 0."""

    needs: ClassVar[frozenset[Need]] = frozenset()

    def __call__(self, sums: PerAnswer, tokens: Float[Array, "B K R"] | None, logps: AnswerLogps) -> PerAnswer:
        return sums / jnp.where(logps.lengths > 0, logps.lengths, 1.0)


@dataclasses.dataclass(frozen=True)
class Weighted:
    """Tokens that differ between the two answers count `changed` times (DDPO, RLHF-V, arXiv 2312.00849, section 3.2).

    Args:
      changed: weight of a changed token; unchanged ones have weight 1.
      mean: divide by the total weight, as the paper does; the release does not.
    """

    changed: float
    mean: bool = True
    needs: ClassVar[frozenset[Need]] = frozenset({Need.TOKENS, Need.CHANGED})

    def __call__(self, sums: PerAnswer, tokens: Float[Array, "B K R"] | None, logps: AnswerLogps) -> PerAnswer:
        weight = logps.token_weight * jnp.where(logps.changed, self.changed, 1.0)
        return weighted_mean(tokens, weight) if self.mean else weighted_sum(tokens, weight)


@dataclasses.dataclass(frozen=True)
class LengthDesensitized:
    """Tokens behind the length of the row's shorter answer count `alpha` times (LD-DPO, arXiv 2409.06411): 1 is the sum, 0 cuts them off."""

    alpha: float
    needs: ClassVar[frozenset[Need]] = frozenset({Need.TOKENS})

    def __call__(self, sums: PerAnswer, tokens: Float[Array, "B K R"] | None, logps: AnswerLogps) -> PerAnswer:
        return length_desensitized(tokens, logps.token_weight, self.alpha)


Aggregator = Sum | Mean | Weighted | LengthDesensitized


def weighted_sum(tokens: Float[Array, "*b R"], weight: Float[Array, "*b R"]) -> Float[Array, "*b"]:
    return jnp.sum(tokens * weight, axis=-1)


def weighted_mean(tokens: Float[Array, "*b R"], weight: Float[Array, "*b R"]) -> Float[Array, "*b"]:
    total = jnp.sum(weight, axis=-1)
    return weighted_sum(tokens, weight) / jnp.where(total > 0, total, 1.0)


def length_desensitized(tokens: Float[Array, "B K R"], weight: Float[Array, "B K R"], alpha: float) -> PerAnswer:
    """Scored tokens are counted from the answer's first one; the public length is that of the row's shortest answer."""
    scored = weight > 0
    place = jnp.cumsum(scored, axis=-1) - 1
    public = jnp.min(jnp.sum(scored, axis=-1), axis=-1)[:, None, None]
    return weighted_sum(tokens, weight * jnp.where(place < public, 1.0, alpha))


@dataclasses.dataclass(frozen=True)
class Divergence:
    """f'(pi / pi_ref) in place of the log-ratio s (f-DPO, arXiv 2309.16240).

    reverse_kl: s; forward_kl: -exp(-s); js: log sigmoid(s), up to a constant; alpha: exp((a - 1) s) / (a - 1).
    """

    name: str = "reverse_kl"
    alpha: float = 0.5

    def __call__(self, s: PerAnswer) -> PerAnswer:
        match self.name:
            case "reverse_kl":
                return s
            case "forward_kl":
                return -exp(-s)
            case "js":
                return jax.nn.log_sigmoid(s)
            case "alpha":
                return exp((self.alpha - 1) * s) / (self.alpha - 1)
        raise ValueError(f"unknown divergence {self.name!r}")


@dataclasses.dataclass(frozen=True)
class Score:
    """s = f(A(log pi) - A(log pi_ref)), A the aggregator.

    Args:
      aggregate: A.
      reference: whether the reference's log-probs are subtracted.
      transform: f; None leaves the difference as it is.
      guidance: g of classifier-free guidance. The policy's log-prob becomes log pi(y | m) + g (log pi(y | m) - log pi(y | no image)), the last
        of which carries no gradient (V-DPO, arXiv 2411.02712).
    """

    aggregate: Aggregator = Sum()
    reference: bool = True
    transform: Callable[[PerAnswer], PerAnswer] | None = None
    guidance: float = 0.0

    @property
    def needs(self) -> frozenset[Need]:
        own = {Need.REFERENCE} if self.reference else set()
        return self.aggregate.needs | own | ({Need.NO_IMAGE} if self.guidance else set())

    def __call__(self, stats: BranchStats, branch: Branch) -> Float[Array, " B"]:
        logps = branch.of(stats)
        s = self.aggregate(logps.policy, logps.policy_tokens, logps)
        if self.guidance:
            blind = stats.no_image
            s = s + self.guidance * (s - self.aggregate(blind.policy, blind.policy_tokens, blind)[:, : s.shape[1]])
        if self.reference:
            s = s - self.aggregate(logps.reference, logps.reference_tokens, logps)
        return (s if self.transform is None else self.transform(s))[:, branch.answer]
