"""Dense DPO as RLHF-V's code runs it: weighted sums, not means, with other constants than the paper's."""

from mmalign_jax.losses.parts import Likelihood, Pair, Score, Terms, Weighted


def objective(*, beta: float = 0.1, changed_weight: float = 1.1, nll_weight: float = 0.0) -> Terms:
    return Pair(beta, score=Score(Weighted(changed_weight, mean=False))) + nll_weight * Likelihood()
