"""KTO (arXiv 2402.01306, equation 8) on pairs: the chosen answer is a desirable example, the rejected one an undesirable one."""

from mmalign_jax.losses.parts import REJECTED, BatchKl, Likelihood, Point, Terms, sigmoid


def objective(*, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0, nll_weight: float = 0.0) -> Terms:
    desirable = Point(beta, link=sigmoid(), baseline=BatchKl(), label="desirable")
    undesirable = Point(beta, REJECTED, sign=-1, link=sigmoid(), baseline=BatchKl(), label="undesirable")
    return desirable_weight * desirable + undesirable_weight * undesirable + nll_weight * Likelihood()
