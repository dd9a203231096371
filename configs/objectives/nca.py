"""NCA for pairs (arXiv 2402.05369): absolute rewards, so that the chosen answer's need not fall."""

from mmalign_jax.losses.parts import REJECTED, Likelihood, Point, Terms


def objective(*, beta: float = 0.01, nll_weight: float = 0.0) -> Terms:
    away = Point(beta, sign=-1, label="away") + Point(beta, REJECTED, sign=-1, label="away")
    return Point(beta) + 0.5 * away + nll_weight * Likelihood()
