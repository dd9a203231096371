"""Dense DPO (RLHF-V, arXiv 2312.00849): weighted means over tokens, those that were corrected count changed_weight times."""

from mmalign_jax.losses.parts import Likelihood, Pair, Score, Terms, Weighted


def objective(*, beta: float = 0.5, changed_weight: float = 5.0, nll_weight: float = 0.0) -> Terms:
    return Pair(beta, score=Score(Weighted(changed_weight))) + nll_weight * Likelihood()
