"""MIA-DPO (arXiv 2410.17637): DPO on prompts of several images; its pairs are what is new."""

from mmalign_jax.losses.parts import Likelihood, Pair, Terms


def objective(*, beta: float = 0.1, nll_weight: float = 0.0) -> Terms:
    return Pair(beta) + nll_weight * Likelihood()
