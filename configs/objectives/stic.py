"""STIC (arXiv 2405.19716): DPO, and the chosen answer's summed log-prob over 1024."""

from mmalign_jax.losses.parts import Likelihood, Pair, Terms


def objective(*, beta: float = 0.1, sum_weight: float = 1.0) -> Terms:
    return Pair(beta) + sum_weight * Likelihood(scale=1024.0)
