"""The loss of a reward model: Bradley-Terry on the scores of two answers."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mmalign_jax.losses.branches import CHOSEN, REJECTED, Branch, Need
from mmalign_jax.losses.stats import BranchStats
from mmalign_jax.losses.terms import Term

PerPair = Float[Array, " B"]
Metrics = dict[str, Float[Array, ""]]


@dataclasses.dataclass(frozen=True)
class RewardHead(Term):
    """-log sigmoid(r_w - r_l - margin_weight margin) + centering (r_w + r_l)^2 + square_weight (r_w^2 + r_l^2) / 2, r the scores of whole answers.

    It reads no log-probs, so the vocabulary is not computed for it.

    Args:
      margin_weight: of the pairs' margins, in units of the score (Llama 2, arXiv 2307.09288, section 3.2.2).
      centering: see `bradley_terry`.
      square_weight: keeps scores small (align-anything has 0.001).
    """

    margin_weight: float = 0.0
    centering: float = 0.01
    square_weight: float = 0.0
    label: ClassVar[str] = "scores"
    reads_logps: ClassVar[bool] = False
    branches: ClassVar[tuple[Branch, ...]] = (CHOSEN, REJECTED)

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.SCORES} | ({Need.MARGIN} if self.margin_weight else set()))

    @staticmethod
    def scores(stats: BranchStats) -> tuple[PerPair, PerPair]:
        return stats.scores[:, 0], stats.scores[:, 1]

    def __call__(self, stats: BranchStats) -> PerPair:
        margin = self.margin_weight * stats.margin if self.margin_weight else None
        loss, _ = bradley_terry(*self.scores(stats), margin=margin, centering=self.centering)
        return loss + self.square_weight * jnp.mean(jnp.square(stats.scores[:, :2]), axis=1)

    def metrics(self, stats: BranchStats) -> dict[str, Float[Array, "*b"]]:
        """Scores are the rewards. `rewards/std` is over the answers of the rows that are computed together."""
        chosen, rejected = self.scores(stats)
        gap = chosen - rejected
        margin = self.margin_weight * stats.margin if self.margin_weight else 0.0
        return {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": gap,
            "rewards/accuracies": gap > 0,  # a tie is wrong
            "rewards/mean": 0.5 * (chosen + rejected),
            "rewards/std": jnp.std(stats.scores[:, :2]),
            "grad_weight": jax.nn.sigmoid(margin - gap),
        }


def bradley_terry(
    chosen: Float[Array, " B"], rejected: Float[Array, " B"], *, margin: Float[Array, " B"] | None = None, centering: float = 0.0
) -> tuple[Float[Array, " B"], Metrics]:
    """-log sigmoid(r_w - r_l - margin) + centering (r_w + r_l)^2 of each pair, and metrics (means over the batch).

    Args:
      chosen, rejected: scores of the two answers, from a head on the hidden state of the last token that is not padding.
      margin: by how much the chosen answer's score should be larger (Llama 2, arXiv 2307.09288, section 3.2.2).
      centering: keeps scores near 0, which differences alone leave open (arXiv 2312.09244); 0.01 is usual.
    """
    chosen, rejected = (x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in (chosen, rejected))
    gap = chosen - rejected
    loss = -jax.nn.log_sigmoid(gap if margin is None else gap - jax.lax.stop_gradient(margin)) + centering * jnp.square(chosen + rejected)
    both = jnp.stack([chosen, rejected])
    metrics = {
        "loss": jnp.mean(loss),
        "scores/accuracies": jnp.mean(gap > 0),  # a tie is wrong
        "scores/margins": jnp.mean(gap),
        "scores/mean": jnp.mean(both),
        "scores/std": jnp.std(both),
    }
    return loss, {name: jax.lax.stop_gradient(value.astype(jnp.float32)) for name, value in metrics.items()}
