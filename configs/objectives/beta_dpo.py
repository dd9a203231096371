"""beta-DPO (arXiv 2407.08639): beta moves with the batch's mean gap, and outlying pairs do not count."""

from mmalign_jax.losses.parts import ByBatch, Likelihood, Pair, Terms


def objective(*, beta: float = 0.1, a: float = 0.6, rho: float = 0.2, momentum: float = 0.9, nll_weight: float = 0.0) -> Terms:
    return Pair(ByBatch(beta, a, rho, momentum)) + nll_weight * Likelihood()
