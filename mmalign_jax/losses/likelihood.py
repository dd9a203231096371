"""Terms that read the policy's likelihood alone."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmalign_jax.losses import links
from mmalign_jax.losses.branches import CHOSEN, REJECTED, Branch, Need
from mmalign_jax.losses.scores import Mean, Score
from mmalign_jax.losses.stats import BranchStats
from mmalign_jax.losses.terms import Term

PerPair = Float[Array, " B"]


@dataclasses.dataclass(frozen=True)
class Likelihood(Term):
    """-A(log pi), the mean over the answer's tokens by default; for the chosen answer `stats.nll` stands for this mean where it is given.

    Args:
      scale: divides the sum over tokens, in place of the answer's length; 0: the length.
    """

    branch: Branch = CHOSEN
    scale: float = 0.0
    label: ClassVar[str] = "likelihood"

    @property
    def branches(self) -> tuple[Branch, ...]:
        return (self.branch,)

    @property
    def needs(self) -> frozenset[Need]:
        return self.branch.needs

    def __call__(self, stats: BranchStats) -> PerPair:
        if self.branch == CHOSEN and stats.nll is not None:
            return stats.nll * (stats.answers.lengths[:, 0] / self.scale) if self.scale else stats.nll
        if self.scale:
            return -self.branch.of(stats).policy[:, self.branch.answer] / self.scale
        return -Score(Mean(), reference=False)(stats, self.branch)


@dataclasses.dataclass(frozen=True)
class Auxiliary(Term):
    """Mean negative log-likelihood of rows of another data set (`config.auxiliary`) (HA-DPO, arXiv 2311.16839, section 3.3)."""

    label: ClassVar[str] = "auxiliary"
    of_pair: ClassVar[bool] = False
    branches: ClassVar[tuple[Branch, ...]] = ()
    needs: ClassVar[frozenset[Need]] = frozenset({Need.AUXILIARY})

    def __call__(self, stats: BranchStats) -> PerPair:
        return stats.auxiliary_nll


@dataclasses.dataclass(frozen=True)
class ConfidenceLikelihood(Term):
    """-sum_t sg(p_t) log p_t: tokens count by how likely they are already (AdPO, arXiv 2504.01735)."""

    branch: Branch = CHOSEN
    label: ClassVar[str] = "likelihood"

    @property
    def branches(self) -> tuple[Branch, ...]:
        return (self.branch,)

    @property
    def needs(self) -> frozenset[Need]:
        return self.branch.needs | {Need.TOKENS}

    def __call__(self, stats: BranchStats) -> PerPair:
        logps = self.branch.of(stats)
        weight = logps.token_weight * jax.lax.stop_gradient(jnp.exp(logps.policy_tokens))
        return -jnp.sum(weight * logps.policy_tokens, axis=-1)[:, self.branch.answer]


@dataclasses.dataclass(frozen=True)
class Odds(Term):
    """-log sigmoid of the log of the odds' ratio, odds = p / (1 - p), p the geometric mean of the answer's token probabilities
    (ORPO, arXiv 2403.07691, equation 7)."""

    label: ClassVar[str] = "odds"
    branches: ClassVar[tuple[Branch, ...]] = (CHOSEN, REJECTED)
    needs: ClassVar[frozenset[Need]] = frozenset()

    def logit(self, stats: BranchStats) -> PerPair:
        mean = Score(Mean(), reference=False)
        return _log_odds(mean(stats, CHOSEN)) - _log_odds(mean(stats, REJECTED))

    def __call__(self, stats: BranchStats) -> PerPair:
        return links.logistic()(self.logit(stats))


def _log_odds(mean_logp: PerPair) -> PerPair:
    """log(p / (1 - p)) of p = exp(mean_logp), exact also where p is nearly 1 or nearly 0."""
    a = jnp.minimum(mean_logp, -1e-7)
    near = a > -jnp.log(2.0)
    # both branches are differentiated: each gets an argument that it can bear
    log1mexp = jnp.where(near, jnp.log(-jnp.expm1(jnp.where(near, a, -1.0))), jnp.log1p(-jnp.exp(jnp.where(near, -1.0, a))))
    return a - log1mexp
