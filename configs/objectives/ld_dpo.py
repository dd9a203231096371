"""LD-DPO (arXiv 2409.06411): what the longer answer has beyond the shorter one's length counts alpha times. 1 is DPO."""

from mmalign_jax.losses.parts import LengthDesensitized, Likelihood, Pair, Score, Terms


def objective(*, beta: float = 0.1, alpha: float = 0.5, nll_weight: float = 0.0) -> Terms:
    return Pair(beta, score=Score(LengthDesensitized(alpha))) + nll_weight * Likelihood()
