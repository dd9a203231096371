"""ORPO (arXiv 2403.07691): likelihood of the chosen answer, and -log sigmoid of the log odds' ratio."""

from mmalign_jax.losses.parts import Likelihood, Odds, Terms


def objective(*, odds_weight: float = 0.1, nll_weight: float = 1.0) -> Terms:
    return odds_weight * Odds() + nll_weight * Likelihood()
