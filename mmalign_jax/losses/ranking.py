"""Rows whose answers are a group, ranked by their rewards."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from mmalign_jax.losses.branches import CHOSEN, Branch, Need
from mmalign_jax.losses.scores import Score
from mmalign_jax.losses.stats import BranchStats
from mmalign_jax.losses.terms import PerPair, Term


@dataclasses.dataclass(frozen=True)
class Ranking(Term):
    """-sum_i log(e^h_i / (e^h_i + sum of e^h_j over the answers j with less reward)), h = beta s: that the answers come in the order of their
    rewards under a Plackett-Luce model (DPO, arXiv 2305.18290, appendix A.3, equation 20).

    Answers of the same reward are not compared. Two answers give DPO.
    """

    beta: float = 0.1
    score: Score = Score()
    label: ClassVar[str] = "ranking"
    branches: ClassVar[tuple[Branch, ...]] = (CHOSEN,)  # and all others of the row, whose number the data decide

    @property
    def needs(self) -> frozenset[Need]:
        return self.score.needs | {Need.REWARDS}

    def __call__(self, stats: BranchStats) -> PerPair:
        h = self._h(stats)
        behind = self._above(stats) | jnp.eye(h.shape[1], dtype=bool)
        below = jnp.broadcast_to(h[:, None, :], behind.shape)
        return jnp.sum(jax.nn.logsumexp(below, axis=-1, where=behind) - h, axis=-1)

    def metrics(self, stats: BranchStats) -> dict[str, Float[Array, "*b"]]:
        """`ranking/accuracies`: how many of the pairs of different rewards the policy ranks in their order, by row; a tie is wrong."""
        h, above = self._h(stats), self._above(stats)
        right = jnp.sum(above & (h[:, :, None] > h[:, None, :]), axis=(1, 2))
        return {"ranking/accuracies": right / jnp.maximum(jnp.sum(above, axis=(1, 2)), 1)}

    def _h(self, stats: BranchStats) -> Float[Array, "B K"]:
        count = stats.answers.lengths.shape[1]
        return self.beta * jnp.stack([self.score(stats, Branch("answers", number)) for number in range(count)], axis=1)

    @staticmethod
    def _above(stats: BranchStats) -> Bool[Array, "B K K"]:
        """Whether answer i has more reward than answer j."""
        return stats.rewards[:, :, None] > stats.rewards[:, None, :]
