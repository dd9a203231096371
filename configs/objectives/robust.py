"""Robust DPO (arXiv 2403.00409): unbiased when labels are flipped with probability label_smoothing; losses may be negative."""

from mmalign_jax.losses.parts import Likelihood, Pair, Terms, robust


def objective(*, beta: float = 0.1, label_smoothing: float = 0.1, nll_weight: float = 0.0) -> Terms:
    return Pair(beta, robust(label_smoothing=label_smoothing)) + nll_weight * Likelihood()
