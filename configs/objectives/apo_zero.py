"""APO-zero (arXiv 2408.06266): 1 - sigmoid(r_w) + sigmoid(r_l), for chosen answers that are better than the model's own."""

from mmalign_jax.losses.parts import REJECTED, Likelihood, Point, Terms, sigmoid


def objective(*, beta: float = 0.1, nll_weight: float = 0.0) -> Terms:
    rejected = Point(beta, REJECTED, sign=-1, link=sigmoid(), label="rejected")
    return Point(beta, link=sigmoid(), label="chosen") + 1.0 * rejected + nll_weight * Likelihood()
