"""SimPO (arXiv 2405.14734, equation 6): -log sigmoid(beta (mean log pi_w - mean log pi_l) - gamma). gamma is absolute, not gamma / beta."""

from mmalign_jax.losses.parts import Likelihood, Mean, Pair, Score, Terms


def objective(*, beta: float = 2.0, gamma: float = 0.5, nll_weight: float = 0.0) -> Terms:
    return Pair(beta, score=Score(Mean(), reference=False), gamma=gamma) + nll_weight * Likelihood()
