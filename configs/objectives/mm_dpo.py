"""MM-DPO (MM-RLHF, arXiv 2502.10391): beta grows with the pair's margin, beta (1 + w (1 - exp(-k margin)))."""

from mmalign_jax.losses.parts import ByMargin, Likelihood, Pair, Terms


def objective(*, beta: float = 0.1, w: float = 0.5, k: float = 0.5, nll_weight: float = 0.0) -> Terms:
    return Pair(ByMargin(beta, w, k)) + nll_weight * Likelihood()
