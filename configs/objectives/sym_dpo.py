"""SymDPO (arXiv 2411.11909): DPO on demonstrations whose answers are symbols, and the likelihood that its code adds."""

from mmalign_jax.losses.parts import Likelihood, Pair, Terms


def objective(*, beta: float = 0.1, nll_weight: float = 1.0) -> Terms:
    return Pair(beta) + nll_weight * Likelihood()
