"""BCO for pairs (arXiv 2404.04656): each answer against the running mean of all rewards."""

from mmalign_jax.losses.parts import REJECTED, Likelihood, Point, RunningMean, Terms


def objective(*, beta: float = 0.01, nll_weight: float = 0.0) -> Terms:
    chosen = Point(beta, baseline=RunningMean(), label="chosen")
    rejected = Point(beta, REJECTED, sign=-1, baseline=RunningMean(), label="rejected")
    return chosen + 1.0 * rejected + nll_weight * Likelihood()
