"""AlphaPO (arXiv 2501.03884): SimPO with the reward (1 - p^-alpha) / alpha, p = exp(mean log pi)."""

from mmalign_jax.losses.parts import Likelihood, Mean, Pair, Score, Terms, exp


def objective(*, beta: float = 2.5, gamma: float = 0.1, alpha: float = 0.25, nll_weight: float = 0.0) -> Terms:
    """An alpha of 0 would be SimPO; see docs/objectives.md on how this file was added."""
    score = Score(Mean(), reference=False, transform=lambda mean: (1 - exp(-alpha * mean)) / alpha)
    return Pair(beta, score=score, gamma=gamma) + nll_weight * Likelihood()
