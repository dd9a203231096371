"""Rows of one answer each that is desirable or not: nothing is set above something else."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmalign_jax.losses import links
from mmalign_jax.losses.baselines import Baseline, Constant
from mmalign_jax.losses.branches import CHOSEN, Branch, Need
from mmalign_jax.losses.scores import Score
from mmalign_jax.losses.stats import BranchStats
from mmalign_jax.losses.terms import PerPair, Term


@dataclasses.dataclass(frozen=True)
class Labelled(Term):
    """weight link(sign (beta s - baseline)): sign 1 and `desirable_weight` where the row's answer is desirable, else -1 and `undesirable_weight`."""

    beta: float = 0.1
    link: links.Link = links.logistic()
    score: Score = Score()
    baseline: Baseline = Constant()
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    label: ClassVar[str] = "labelled"

    @property
    def branches(self) -> tuple[Branch, ...]:
        return (CHOSEN, *self.baseline.branches)

    @property
    def needs(self) -> frozenset[Need]:
        return self.score.needs | self.baseline.needs | {Need.LABELS}

    def logit(self, stats: BranchStats) -> PerPair:
        baseline = jax.lax.stop_gradient(self.baseline(stats, self.beta, self.score))
        return jnp.where(stats.desirable, 1.0, -1.0) * (self.beta * self.score(stats, CHOSEN) - baseline)

    def __call__(self, stats: BranchStats) -> PerPair:
        return jnp.where(stats.desirable, self.desirable_weight, self.undesirable_weight) * self.link(self.logit(stats))

    def metrics(self, stats: BranchStats) -> dict[str, Float[Array, "*b"]]:
        """Rewards of the two kinds of rows, NaN where a step has none of a kind; how many answers are on their side of the baseline."""
        rewards, h = self.beta * self.score(stats, CHOSEN), self.logit(stats)
        mean = lambda some: jnp.sum(jnp.where(some, rewards, 0.0)) / jnp.sum(some)  # noqa: E731
        return {
            "rewards/desirable": mean(stats.desirable),
            "rewards/undesirable": mean(~stats.desirable),
            "rewards/baseline": jnp.mean(self.baseline(stats, self.beta, self.score)),
            "rewards/accuracies": h > 0,  # a tie is wrong
            "grad_weight": jnp.abs(jax.grad(lambda x: jnp.sum(self.link(x)))(h)),
        }
