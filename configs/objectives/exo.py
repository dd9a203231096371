"""EXO for pairs (arXiv 2402.00856): reverse KL to the smoothed label. label_smoothing must be above 0."""

from mmalign_jax.losses.parts import Likelihood, Pair, Terms, exo


def objective(*, beta: float = 0.1, label_smoothing: float = 1e-3, nll_weight: float = 0.0) -> Terms:
    return Pair(beta, exo(label_smoothing=label_smoothing)) + nll_weight * Likelihood()
