"""APO-down (arXiv 2408.06266): sigmoid(r_w) + 1 - sigmoid(r_w - r_l), for chosen answers that are worse than the model's own."""

from mmalign_jax.losses.parts import Likelihood, Pair, Point, Terms, sigmoid


def objective(*, beta: float = 0.1, nll_weight: float = 0.0) -> Terms:
    return Pair(beta, sigmoid()) + Point(beta, sign=-1, link=sigmoid(), label="chosen") + nll_weight * Likelihood()
