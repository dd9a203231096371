"""Simple preference optimization with a reference-free reward (SimPO, Meng et al., arXiv 2405.14734, equation 6)."""

from mmalign_jax.losses import terms
from mmalign_jax.types import BranchStats


def simpo(stats: BranchStats, *, beta: float = 2.0, gamma: float = 0.5, nll_weight: float = 0.0) -> tuple[terms.PerPair, terms.Metrics]:
    """L = -log sigmoid(h), h = beta (log pi(y_w | x, m) / |y_w| - log pi(y_l | x, m) / |y_l|) - gamma.

    Args:
      beta: scale of the reward, the mean log-prob a token.
      gamma: margin between the two rewards, absolute: the authors' release has gamma / beta instead.
      nll_weight: weight of the chosen answer's mean negative log-likelihood a token (CPO-SimPO).
    """
    stats = terms.as_float32(stats)
    means = terms.mean_logps(stats)
    rewards = beta * means
    h = rewards[:, 0] - rewards[:, 1] - gamma
    loss = terms.logistic(h) - nll_weight * means[:, 0]
    return loss, terms.averaged(terms.pair_metrics(stats, loss, rewards, h))
