"""MM-DPO as MM-RLHF's code runs it: beta moves with the batch (beta-DPO), whatever the margins are."""

from mmalign_jax.losses.parts import ByBatch, Likelihood, Pair, Terms


def objective(*, beta: float = 0.1, a: float = 0.1, rho: float = 0.2, momentum: float = 0.9, nll_weight: float = 0.25) -> Terms:
    return Pair(ByBatch(beta, a, rho, momentum)) + nll_weight * Likelihood()
