"""MPO (InternVL, arXiv 2411.10442): preference (DPO), quality (BCO) and generation (likelihood) at once."""

from mmalign_jax.losses.parts import REJECTED, Likelihood, Pair, Point, RunningMean, Terms


def objective(*, beta: float = 0.1, preference_weight: float = 0.8, quality_weight: float = 0.2, nll_weight: float = 1.0) -> Terms:
    chosen = Point(beta, baseline=RunningMean(), label="quality")
    rejected = Point(beta, REJECTED, sign=-1, baseline=RunningMean(), label="quality")
    return preference_weight * Pair(beta) + quality_weight * (chosen + rejected) + nll_weight * Likelihood()
