"""CPO (arXiv 2401.08417): DPO without a reference, and the chosen answer's likelihood."""

from mmalign_jax.losses.parts import Likelihood, Pair, Score, Terms


def objective(*, beta: float = 0.1, nll_weight: float = 1.0) -> Terms:
    return Pair(beta, score=Score(reference=False)) + nll_weight * Likelihood()
